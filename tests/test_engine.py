"""The DeepSpeed engine alone: optimizer steps that must not be taken, in every ZeRO stage and precision."""

import json

from training_process import run_script

HEAD = """
import json, math, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from pipelines.training.config import TrainOptions
from pipelines.training.engine import Engine
"""

SCRIPT = (
    HEAD
    + """
def engine(zero, precision, clip, optimizer):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    options = TrainOptions(
        zero_stage=zero, precision=precision, clip_grad_norm=clip, optimizer=optimizer, exact_sums=False
    )
    return Engine(module, options, micro=2, accumulation=2)

def step(engine, number, spoilt="", factor=1.0, take=True):
    # The gradient of the parameters whose names end so is multiplied in one micro-batch of the last worker.
    for part in range(2):
        rng = torch.Generator().manual_seed(100 * number + 10 * part + dist.get_rank())
        loss = engine(torch.randn(2, 6, generator=rng)).float().square().mean()
        hooks = []
        if factor != 1 and part == 0 and dist.get_rank() == dist.get_world_size() - 1:
            hooks = [p.register_hook(lambda g: g * factor) for name, p in engine.named if name.endswith(spoilt)]
        engine.backward(loss)
        for hook in hooks:
            hook.remove()
        if part == 0:
            engine.accumulate()
    return engine.step(0.1, take=take)

def held(engine):
    state = {name: value.float().clone() for name, value in engine.full_parameters()}
    return state | {"of optimizer " + name: value for name, value in engine.optimizer_state().items()}

def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())

BAD = {
    "infinite": {"factor": math.inf},
    "one NaN": {"spoilt": "2.bias", "factor": math.nan},
    "objection": {"take": False},
}
found = {}
for case in json.loads(sys.argv[1]):
    disturbed, undisturbed = engine(*case), engine(*case)
    wrong = []
    for number, (name, bad) in enumerate(BAD.items()):
        for one in (disturbed, undisturbed):
            if not step(one, 2 * number):
                wrong.append(f"before {name}: a good step is not taken")
        before = held(disturbed)
        if step(disturbed, 2 * number + 1, **bad):
            wrong.append(f"{name}: the step is taken")
        if math.isfinite(disturbed.grad_norm()) != (name == "objection"):
            wrong.append(f"{name}: the gradient has norm {disturbed.grad_norm()}")
        if not equal(held(disturbed), before):
            wrong.append(f"{name}: weights or moments moved")
    for one in (disturbed, undisturbed):
        step(one, 9)
    if not equal(held(disturbed), held(undisturbed)):
        wrong.append("something of a step that was not taken waited for the next one")
    found[str(case)] = wrong
if dist.get_rank() == 0:
    print("FOUND" + json.dumps(found))
dist.destroy_process_group()
"""
)

# Which collectives each part of an optimizer step makes, and whether the averages are those of the whole weights.
COLLECTIVES = (
    HEAD
    + """
from torch.profiler import ProfilerActivity, profile

def collectives(work):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return sorted(event.name for event in found.events() if event.name.startswith(("gloo:", "c10d::")))

found = {}
for zero, exact in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    options = TrainOptions(zero_stage=zero, exact_sums=exact, ema_decay=0.9)
    engine = Engine(module, options, micro=2, accumulation=1)
    expected, made = {}, {}
    for step in range(3):
        rng = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = engine(torch.randn(2, 6, generator=rng)).square().mean()
        made["backward"] = collectives(lambda: engine.backward(loss))
        engine.step(0.1)
        made["average"] = collectives(lambda: engine.average(0.9))
        for name, value in engine.full_parameters():
            expected[name] = torch.lerp(expected[name], value, 0.1) if name in expected else value.clone()
    made["equal"] = all(torch.allclose(value, expected[name]) for name, value in engine.averages())
    found[f"{zero} {exact}"] = made
if dist.get_rank() == 0:
    print("FOUND" + json.dumps(found))
dist.destroy_process_group()
"""
)


def test_without_exact_sums_no_step_that_is_not_finite_or_objected_to_is_taken_in_any_stage_and_precision(tmp_path):
    """What preset `fast` trains with, where DeepSpeed decides by the gradient's norm."""
    cases = [(0, "fp32", 0.5, "adamw"), (1, "fp32", 0.0, "adamw"), (2, "fp32", 0.5, "sgd"), (3, "fp32", 0.0, "sgd")]
    cases += [(0, "bf16", 0.0, "adamw"), (1, "bf16", 0.0, "sgd"), (2, "bf16", 0.5, "sgd"), (3, "bf16", 0.5, "adamw")]
    output = run_script(SCRIPT, 2, [json.dumps(cases)], tmp_path)
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    found = json.loads(line.removeprefix("FOUND"))
    assert len(found) == len(cases)
    assert {case: wrong for case, wrong in found.items() if wrong} == {}


def test_exact_sums_replace_the_reduction_and_averages_need_no_collective(tmp_path):
    cases = [(0, True), (1, True), (2, True), (2, False), (3, False)]
    output = run_script(COLLECTIVES, 2, [json.dumps(cases)], tmp_path)
    found = json.loads(next(line for line in output.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))
    assert [case for case, made in found.items() if made["average"] or not made["equal"]] == []
    assert [case for case, made in found.items() if case.endswith("True") and made["backward"]] == []
    assert found["2 False"]["backward"]  # what the others leave out
