"""What a served application is asked to be: typed, and checked before anything starts."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from libra_ray.config import ControlConfig
from libra_ray.config.networks import PolicyCompile, PolicyPrecision

DEFAULT_PORT = 8765
MOVED = {
    "planner": "levels.planner",
    "refiner": "levels.refiner",
    "coarse_only": "variant=coarse_only",
    "first_plan_timeout_s": "first_intent_timeout_s",
}
"""Arguments of earlier versions, and what they are now."""


def _nested(given: Any) -> Any:
    """`{"planner.replicas": 2}` as `{"planner": {"replicas": 2}}`; what is no map as it is."""
    if not isinstance(given, Mapping):
        return given
    tree: dict[str, Any] = {}
    for name, value in given.items():
        head, dot, rest = str(name).partition(".")
        below = {rest: value} if dot else value
        if head in tree:
            if not (isinstance(below, Mapping) and isinstance(tree[head], Mapping)):
                raise ValueError(f"{head!r} is given as a whole and as {name!r}; give one of both")
            if twice := tree[head].keys() & below.keys():
                raise ValueError(f"{head}.{min(twice)} is given twice; give it once")
            below = {**tree[head], **below}
        tree[head] = below
    return tree


class _Frozen(BaseModel):
    """A record whose unknown names are refused with their nearest neighbours; dotted names reach into it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        tree = _nested(given)
        for name in tree if isinstance(tree, dict) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, cls.model_fields, n=2, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise ValueError(f"unknown argument {name!r}; {hint}valid: {', '.join(cls.model_fields)}")
        return tree


class Replicas(_Frozen):
    """One deployment's processes."""

    replicas: int = Field(default=1, ge=1, description="Processes; with autoscaling the least number.")
    max_replicas: int = Field(default=0, ge=0, description="With a number above `replicas`, as many are started under load.")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs reserved per process.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs reserved per process; a fraction shares one.")

    @model_validator(mode="after")
    def _range(self) -> Self:
        if 0 < self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}; 0 turns autoscaling off")
        return self


class LevelReplicas(Replicas):
    """The processes of one level, which compute; the defaults are those of the level that acts."""

    max_batch: int = Field(default=64, ge=1, le=4096, description="Robots in one call.")
    threads: int = Field(default=1, ge=1, description="Threads that one call computes with.")
    nice: int = Field(default=0, ge=0, le=19, description="How far others go first, as by `nice`.")
    timeout_s: float = Field(default=2.0, gt=0, description="A longer call is given up, and tried elsewhere.")


class UpperReplicas(LevelReplicas):
    """Of a level above: while robots have time to spare, it goes behind the others wherever they want the same core."""

    num_cpus: float = Field(default=0.5, ge=0, description="CPUs reserved per process.")
    nice: int = Field(default=19, ge=0, le=19, description="The same, while robots have time to spare.")
    timeout_s: float = Field(default=10.0, gt=0, description="A call that takes longer is given up.")


class GatewayReplicas(Replicas):
    """The gateway's: it computes little."""

    num_cpus: float = Field(default=0.25, ge=0, description="CPUs reserved per process.")


class PolicySettings(_Frozen):
    """How the levels' networks are run; see `config.PolicyConfig`."""

    precision: PolicyPrecision = Field(default="auto", description="auto: bf16 on a GPU, fp32 elsewhere.")
    compile: PolicyCompile = Field(default="auto", description="auto: CUDA graphs on a GPU, none elsewhere.")

    @property
    def changes(self) -> dict[str, str]:
        """For `load_policy`, whatever the checkpoint was saved with."""
        return {"policy.precision": self.precision, "policy.compile": self.compile}


class ServingSettings(_Frozen):
    """Arguments of `serve_apps.libra:app`.

    With `intent_timeout_s` above 0 a robot whose intent is used up waits for the next one; with 0 it goes on under the one that
    it has. By default (-1) it waits under the rule `fifo`, which as published plans while the robot stands, for as long as for
    an episode's first one, and under the others it does not.

    Raises:
        ValueError: an unknown name or a value outside its range; the message says what is valid.
    """

    checkpoint: str = Field(min_length=1, description="A checkpoint folder, or `models:/name@alias` of the MLflow registry.")
    revision: str = Field(default="", description="Any text; a new one loads the same address again.")
    tracking_uri: str = Field(default="", description="MLflow store for `models:/`; empty is that of the folder `runs`.")
    variant: str = Field(default="", description="Another way to run the policy, e.g. `coarse_only` of `libra`.")
    policy: PolicySettings = PolicySettings()
    levels: dict[str, LevelReplicas] = Field(default={}, description="By name; those of the checkpoint that it leaves out too.")
    gateway: GatewayReplicas = GatewayReplicas()
    rule: Literal["fifo", "overlap", "event"] = Field(default="overlap", description="When a new intent is asked for.")
    control_hz: float = Field(default=0.0, ge=0, le=10_000, description="Control rate; 0 takes that of the demonstrations.")
    execute_steps: int = Field(default=0, ge=0, description="Control steps executed of each chunk; 0 means all H.")
    committed_steps: int = Field(default=0, ge=0, description="Steps that robots go on while a chunk is computed; at most H/2.")
    hold: Literal["declared", "still", "repeat"] = Field(
        default="declared", description="The safe action: no motion, or the last one; declared: as the actions are."
    )
    max_intent_age_steps: int = Field(default=0, ge=0, description="Oldest intent to act under; 0: 3 times what it covers.")
    first_intent_timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for an episode's first intent.")
    intent_timeout_s: float = Field(
        default=-1.0, ge=-1, description="For later ones, where none covers the step; -1: see below."
    )
    window_ms: float = Field(default=-1.0, ge=-1, le=1000, description="Longest wait for others in a batch; -1 derives it.")
    host: str = Field(default="127.0.0.1", description="Interface of the gateways' own port; 0.0.0.0 lets other machines in.")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="The gateways' own port; 0 leaves only Serve's proxy.")
    token: str = Field(default="", description="Robots must send it as bearer token; empty asks for none.")
    max_message_bytes: int = Field(default=16 * 2**20, ge=1024, le=2**30, description="Longer requests are refused.")
    scale_up_delay_s: float = Field(default=3.0, ge=0, description="Autoscaling: how long a need must last to be met.")
    scale_down_delay_s: float = Field(default=60.0, ge=0, description="Autoscaling: how long a lull must last.")
    max_connections: int = Field(default=1024, ge=1, description="Robots per gateway process.")

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Self:
        """The settings that `arguments` ask for, with a message of one line where they cannot be.

        Raises:
            ValueError: an unknown name or a value outside its range; the message says what is valid.
        """
        for name in map(str, arguments):
            head, dot, rest = name.partition(".")
            if head in MOVED:
                raise ValueError(f"argument {name!r} is of an earlier version; it is now {MOVED[head]}{dot}{rest}")
        try:
            return cls.model_validate(dict(arguments))
        except ValidationError as error:
            faults = [
                (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
            ]
            raise ValueError("; ".join(f"{place}: {text}" if place else text for place, text in faults)) from None

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.host not in ("127.0.0.1", "localhost", "::1") and not self.token:
            raise ValueError(f"host={self.host!r} lets other machines command the robots; give a token=... with it")
        return self

    @field_validator("intent_timeout_s", "window_ms")
    @classmethod
    def _derived_or_given(cls, value: float) -> float:
        if -1 < value < 0:
            raise ValueError(f"{value:g} is none; give -1, which derives it, or a number from 0 on")
        return value

    @field_validator("levels", mode="before")
    @classmethod
    def _by_level(cls, given: Any) -> Any:
        return _nested(given)

    def with_levels(self, names: Sequence[str]) -> Self:
        """The settings of every level of a policy, slow to fast; those that were not given have their defaults.

        Raises:
            ValueError: others were given; the message names those there are.
        """
        if unknown := [name for name in self.levels if name not in names]:
            raise ValueError(f"levels.{unknown[0]}: no such level; checkpoint {self.checkpoint} has {', '.join(names)}")
        given = {name: self.levels.get(name, LevelReplicas()).model_dump(exclude_unset=True) for name in names}
        kinds = [*[UpperReplicas] * (len(names) - 1), LevelReplicas]
        levels = {name: kind(**given[name]) for name, kind in zip(names, kinds, strict=True)}
        if self.policy.compile == "graphs" and (without := [name for name, level in levels.items() if not level.num_gpus]):
            raise ValueError(f"policy.compile=graphs needs a GPU; give levels.{without[0]}.num_gpus, or policy.compile=auto")
        return self.model_copy(update={"levels": levels})

    @property
    def intent_wait_s(self) -> float:
        """The longest wait for an intent where the robot has one, which is used up."""
        if self.intent_timeout_s >= 0:
            return self.intent_timeout_s
        return self.first_intent_timeout_s if self.rule == "fifo" else 0.0

    @property
    def control(self) -> ControlConfig:
        """When levels are asked, and what robots do meanwhile."""
        return ControlConfig(**{of.name: getattr(self, of.name) for of in fields(ControlConfig)})

    def user_config(self) -> dict[str, str]:
        """What may change without a restart: the weights."""
        return {"checkpoint": self.checkpoint, "revision": self.revision}
