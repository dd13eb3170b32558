"""hypothesis: the same examples at every run, and no time limit on one, which a busy machine would break."""

from hypothesis import settings

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("tests")
