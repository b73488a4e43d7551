"""The parts of ``python -m lrjax``: each runs one job on real data and checks itself."""
