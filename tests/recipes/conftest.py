from ..subspaces.conftest import noisy as noisy, rollout as rollout
