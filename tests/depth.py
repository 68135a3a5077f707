"""How deep properties are searched: one choice, `pytest --hypothesis-profile ci` (the default) or `nightly`.

`ci` is derandomised and quick: the same examples each time, so that a red build is red again. `nightly` is random and
deep; what it finds is printed with the blob that repeats it. `mutants` is `ci` for `make mutation`, which only asks
whether a test fails: it looks for no shorter way to fail.
"""

from hypothesis import HealthCheck, Phase, settings

CI = "ci"
NIGHTLY = "nightly"
MUTANTS = "mutants"


def register_profiles() -> None:
    """Make the profiles known to Hypothesis and take `ci`; the option of its pytest plugin may choose the other."""
    # A machine that does other things at the same time must not fail a property, so there is no deadline.
    settings.register_profile(CI, deadline=None, derandomize=True, database=None, print_blob=True)
    settings.register_profile(NIGHTLY, deadline=None, derandomize=False, max_examples=2_000, print_blob=True)
    settings.register_profile(
        MUTANTS, settings.get_profile(CI), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
    )
    settings.load_profile(CI)


def depth(*, ci: int, nightly: int, steps: int = 40) -> settings:
    """Return the settings of a state machine: how many examples in each profile, of how many steps at most."""
    examples = nightly if settings.get_current_profile_name() == NIGHTLY else ci
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=slow)
