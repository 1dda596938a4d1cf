"""The DeepSpeed engine alone: optimizer steps that must not be taken, in every ZeRO stage and precision."""

import json

from training_process import run_script

SCRIPT = """
import json, math, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from pipelines.training.config import TrainOptions
from pipelines.training.engine import Engine

def engine(zero, precision, clip):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    options = TrainOptions(zero_stage=zero, precision=precision, clip_grad_norm=clip, exact_sums=False)
    return Engine(module.to(torch.bfloat16 if precision == "bf16" else torch.float32), options, micro=2, accumulation=2)

def step(engine, number, bad=None, take=True):
    dtype = next(engine.module.parameters()).dtype
    for part in range(2):
        rng = torch.Generator().manual_seed(100 * number + 10 * part + dist.get_rank())
        loss = engine(torch.randn(2, 6, generator=rng).to(dtype)).float().square().mean()
        if bad and part == 0 and dist.get_rank() == 1:  # one micro-batch of one worker
            loss = {"nan": loss + (loss * 0).sqrt(), "inf": loss * math.inf}[bad]
        engine.backward(loss)
        if part == 0:
            engine.accumulate()
    return engine.step(0.1, take=take)

def held(engine):
    with engine.full_parameters() as parameters:
        state = {name: value.float().clone() for name, value in parameters}
    return state | {"of optimizer " + name: value for name, value in engine.optimizer_state().items()}

def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())

found = {}
for zero, precision, clip in json.loads(sys.argv[1]):
    for name, options in (("nan", {"bad": "nan"}), ("inf", {"bad": "inf"}), ("objection", {"take": False})):
        disturbed, undisturbed = engine(zero, precision, clip), engine(zero, precision, clip)
        wrong = []
        for one in (disturbed, undisturbed):
            if not step(one, 1):
                wrong.append("a good step is not taken")
        before = held(disturbed)
        if step(disturbed, 2, **options):
            wrong.append("the step is taken")
        if math.isfinite(disturbed.grad_norm()) != (name == "objection"):
            wrong.append(f"its gradient has norm {disturbed.grad_norm()}")
        if not equal(held(disturbed), before):
            wrong.append("weights or moments moved")
        for one in (disturbed, undisturbed):
            if not step(one, 3):
                wrong.append("the step after it is not taken")
        if not equal(held(disturbed), held(undisturbed)):
            wrong.append("something of it waited for the next step")
        found[f"{precision}, ZeRO {zero}, clip {clip}, {name}"] = wrong
if dist.get_rank() == 0:
    print("FOUND" + json.dumps(found))
dist.destroy_process_group()
"""


def test_without_exact_sums_no_stage_and_precision_takes_a_step_that_is_not_finite_or_objected_to(tmp_path):
    cases = [(zero, "fp32", clip) for zero in range(4) for clip in (0.0, 0.5)]
    cases += [(zero, "bf16", clip) for zero in (1, 2, 3) for clip in (0.0, 0.5)]
    output = run_script(SCRIPT, 2, [json.dumps(cases)], tmp_path)
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    found = json.loads(line.removeprefix("FOUND"))
    assert len(found) == 3 * len(cases)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
