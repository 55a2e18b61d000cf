"""When training is sparse, and how much of the plan's sparsity is on: a pure function of the
step."""

from __future__ import annotations

from collections.abc import Sequence

from sparselora_fx.errors import PlanError

When = int | float  # an int counts optimizer steps, a float is a fraction of all of them


def check_when(what: str, value: object, *, top: bool = False) -> When:
    """A step count or a fraction of training in [0, 1) (1.0 too if ``top``); `PlanError`
    otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and (0.0 <= value < 1.0 or (top and value == 1.0)):
        return value
    raise PlanError(
        f"{what} is {value!r}; allowed: a step count (int >= 0), or a fraction of training "
        "in [0, 1)"
    )


def check_schedule(start: object, end: object) -> tuple[When, When | None]:
    """Validated ``(start_step, end_step)``."""
    start = check_when("start_step", start)
    end = None if end is None else check_when("end_step", end, top=True)
    if end is not None and type(end) is type(start) and end < start:
        raise PlanError(
            f"end_step {end!r} comes before start_step {start!r}; raise end_step or leave it out"
        )
    return start, end


def check_ramp(ramp: object) -> tuple[tuple[When, float], ...]:
    """Validated stages ``(from when, sparsity scale in [0, 1])``, in rising order of
    one unit."""
    if ramp is None:
        return ()
    if not isinstance(ramp, Sequence) or isinstance(ramp, str):
        raise PlanError(f"ramp is {ramp!r}; allowed: a list such as [(0.05, 0.5), (0.2, 1.0)]")
    stages = []
    for stage in ramp:
        if not isinstance(stage, Sequence) or len(stage) != 2:
            raise PlanError(f"ramp has {stage!r}; each stage is (when, share), such as (0.2, 0.9)")
        sparsity_scale = stage[1]
        if (
            isinstance(sparsity_scale, bool)
            or not isinstance(sparsity_scale, int | float)
            or not 0 <= sparsity_scale <= 1
        ):
            raise PlanError(f"ramp share is {sparsity_scale!r}; allowed: a number in [0, 1]")
        stages.append((check_when("ramp step", stage[0]), float(sparsity_scale)))
    whens = [when for when, _ in stages]
    if len({type(when) for when in whens}) > 1 or sorted(whens) != whens:
        raise PlanError(f"ramp steps are {whens}; give them rising, all counts or all fractions")
    return tuple(stages)


def check_calibrate(value: object) -> str | None:
    """When a plan calibrates: "dense_phase", or None (never)."""
    if value is None or (isinstance(value, str) and value == "dense_phase"):
        return value
    raise PlanError(
        f"calibrate is {value!r}; allowed: 'dense_phase' (from what the dense first steps read), "
        "or None (pass an estimator to sparselora_fx.compile)"
    )


def check_refresh(value: object, calibrate: object) -> int | None:
    """After how many steps a plan calibrates again, or None (never)."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise PlanError(f"refresh is {value!r}; allowed: a number of steps >= 2, or None")
    if calibrate is None:
        raise PlanError("refresh calibrates again; it needs calibrate='dense_phase' in the plan")
    return value


def refreshes(step: int, every: int | None) -> bool:
    """Whether a step that would be sparse runs dense, to be observed: of each ``every`` steps,
    counted from step 0, the first twentieth (at least one), as much as a start_step of 0.05."""
    return every is not None and step % every < -(-every // 20)


def sparsity_scale_at(
    step: int,
    total: int | None,
    start: When,
    end: When | None,
    ramp: tuple[tuple[When, float], ...],
) -> float:
    """The sparsity scale at optimizer step ``step`` (0-based) of
    ``total``: 0 is dense.

    Raises `PlanError` if a fraction has to be turned into a step and ``total`` is not known.
    """
    if step < _steps(start, total) or (end is not None and step >= _steps(end, total)):
        return 0.0
    sparsity_scale = 0.0 if ramp else 1.0
    for when, value in ramp:
        if step >= _steps(when, total):
            sparsity_scale = value
    return sparsity_scale


def _steps(when: When, total: int | None) -> float:
    if isinstance(when, int) or when == 0:
        return when
    if total is None:
        raise PlanError(
            f"the plan's schedule has the fraction {when!r}, so the total number of steps "
            "is needed: call sparselora_fx.step(model, n, total)"
        )
    return when * total
