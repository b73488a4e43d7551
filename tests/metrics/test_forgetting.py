"""Forgetting, transfer and the stability gap, in numbers worked out by hand."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.metrics import continual_scores


scores = jax.jit(continual_scores)


def test_by_hand():
    accuracy = np.array(
        [
            [0.9, 0.2, 0.6, 0.5],
            [0.3, 0.8, 0.4, 0.9],
            [0.1, 0.4, 0.7, 0.6],
            [0.1, 0.1, 0.5, 1.0],
        ]
    )
    got = scores(jnp.array(accuracy), baseline=jnp.full(4, 0.1))
    want = {
        "average_accuracy": np.mean([0.5, 0.9, 0.6, 1.0]),
        "forgetting": np.mean([0.9 - 0.5, 0.8 - 0.9, 0.7 - 0.6]),
        "backward_transfer": np.mean([0.5 - 0.9, 0.9 - 0.8, 0.6 - 0.7]),
        "forward_transfer": np.mean([0.3, 0.4, 0.5]) - 0.1,
        "worst_accuracy": np.mean([0.2, 0.4, 0.6]),
        "stability_gap": np.mean([0.5 - 0.2, 0.8 - 0.4, 0.0]),
    }
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, abs=1e-6), name


def test_what_forgets_nothing():
    """Accuracies that never fall, with what was learned before helping: no loss at all."""
    accuracy = jnp.array([[0.8, 0.8, 0.8], [0.5, 0.9, 0.9], [0.5, 0.6, 0.7]])
    got = scores(accuracy)
    for name in ("forgetting", "backward_transfer", "stability_gap"):
        assert getattr(got, name) == pytest.approx(0, abs=1e-7)
    assert got.forward_transfer == pytest.approx((0.5 + 0.6) / 2)


def test_a_dip_that_closes_is_a_gap_and_no_forgetting():
    """Measured five times a task; only the ends of the tasks do not show it."""
    often = jnp.array([[0.1, 0.5, 0.9, 0.3, 0.6, 0.9], [0.0, 0.0, 0.0, 0.6, 0.7, 0.9]])
    got = scores(often, jnp.array([2, 5]))
    assert got.forgetting == pytest.approx(0)
    assert got.stability_gap == pytest.approx(0.6)
    assert got.worst_accuracy == pytest.approx(0.3)
    ends = scores(often[:, np.array([2, 5])])
    assert ends.stability_gap == pytest.approx(0)
    assert ends.average_accuracy == got.average_accuracy


def test_tasks_that_were_not_learned_are_left_out(getkey):
    accuracy = jr.uniform(getkey(), (5, 7))
    learned_at = jnp.array([1, 3, -1, 6, -1])
    kept = np.array([0, 1, 3])
    got = scores(accuracy, learned_at)
    want = scores(accuracy[kept], learned_at[kept])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_tasks_may_come_in_any_order_and_begin_later_than_another_ended(getkey):
    accuracy = jr.uniform(getkey(), (3, 9))
    learned_at = jnp.array([4, 8, 1])
    order = np.array([2, 0, 1])
    got = scores(accuracy, learned_at)
    np.testing.assert_allclose(got, scores(accuracy[order], learned_at[order]), rtol=1e-6)
    assert got.forward_transfer == pytest.approx((accuracy[0, 1] + accuracy[1, 4]) / 2)
    late = scores(accuracy, learned_at, began_at=jnp.array([2, 6, -1]))
    assert late.forward_transfer == pytest.approx((accuracy[0, 2] + accuracy[1, 6]) / 2)


def test_of_one_task_there_is_no_forgetting_to_speak_of():
    got = scores(jnp.array([[0.7]]))
    assert got.average_accuracy == pytest.approx(0.7)
    assert all(np.isnan(x) for x in got[1:])


def test_runs_are_members_of_a_vmap(getkey):
    accuracy = jr.uniform(getkey(), (4, 3, 3))
    together = jax.jit(jax.vmap(continual_scores))(accuracy)
    for i in range(4):
        member = [x[i] for x in together]
        np.testing.assert_allclose(member, scores(accuracy[i]), rtol=1e-6)


@pytest.mark.usefixtures("shapes_unchecked")
def test_errors():
    with pytest.raises(ValueError, match=r"accuracies \(tasks, times\).*got \(3,\)"):
        continual_scores(jnp.ones(3))
    with pytest.raises(ValueError, match="3 tasks at 5 times: say with learned_at"):
        continual_scores(jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"one learned_at for each of the 3 .* \(2,\)"):
        continual_scores(jnp.ones((3, 5)), jnp.arange(2))
