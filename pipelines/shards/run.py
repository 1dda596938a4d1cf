"""What one run of the shards job leaves in its output while it works: its plan in parts, beside its heartbeat.

Workers read the plan from there, a part at a time, so that neither the driver nor Ray holds it.
"""

from collections.abc import Iterable, Iterator

from deedsr.errors import DeeDSRError
from pipelines import claims
from pipelines.shards.plan import ShardPlan
from pipelines.shards.record import Inventory
from pipelines.storage import Storage

__all__ = ["PlanParts", "live_runs", "read_part"]

_SHARDS_PER_PART = 64


def live_runs(out: Storage) -> dict[str, str]:
    """Runs with a heartbeat in the last ten minutes: the location of the claim, and the process in words.

    Raises DeeDSRError where a claim cannot be read: its run may be at work.
    """
    alive = {}
    for entry in out.list(claims.RUNS):
        place = f"{out.uri}/{entry.path}"
        if not entry.path.endswith(f"/{claims.CLAIM}"):
            continue
        try:
            claim = claims.parsed(out.read(entry.path))
        except FileNotFoundError:  # it has just ended
            continue
        if not claim:
            raise DeeDSRError(
                f"{place} is damaged. A run at work writes it again within a minute; if it stays so, delete it"
            )
        if claims.is_alive(claim):
            alive[place] = claims.named(claim)
    return alive


class PlanParts:
    """A plan in files of some dozen shards each, and which of its shards are to be made."""

    def __init__(self, folder: Storage):
        self.folder = folder
        self.sources = self.shards = 0
        self.reused_sources = 0
        self.missing: list[tuple[str, list[int]]] = []  # part, its shards that are not committed
        self._names: list[str] = []

    def write(self, plans: Iterable[ShardPlan], inventory: Inventory) -> None:
        part: list[ShardPlan] = []
        for plan in plans:
            part.append(plan)
            if len(part) == _SHARDS_PER_PART:
                self._put(part, inventory)
                part = []
        if part:
            self._put(part, inventory)

    def _put(self, part: list[ShardPlan], inventory: Inventory) -> None:
        name = f"plan-{len(self._names):07d}.jsonl"
        self.folder.write(name, b"".join(plan.to_json() + b"\n" for plan in part))
        self._names.append(name)
        missing = [number for number, plan in enumerate(part) if not inventory.holds(plan)]
        if missing:
            self.missing.append((name, missing))
        self.shards += len(part)
        self.sources += sum(len(plan.sources) for plan in part)
        self.reused_sources += sum(len(plan.sources) for plan in part) - sum(len(part[n].sources) for n in missing)

    @property
    def missing_shards(self) -> int:
        return sum(len(shards) for _, shards in self.missing)

    def __iter__(self) -> Iterator[ShardPlan]:
        for name in self._names:
            yield from read_part(self.folder, name)


def read_part(folder: Storage, name: str) -> list[ShardPlan]:
    return [ShardPlan.from_json(line) for line in folder.read(name).splitlines()]
