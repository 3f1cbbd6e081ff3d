"""Several workers learn what one learns, however they share the model, and each goes on where others stopped."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from libra_ray import checkpoint, shards
from libra_ray.common.disk import NoRoomError
from libra_ray.config import override
from libra_ray.model.layers import pretrained_layers
from libra_ray.training import weights
from libra_ray.training.fit import Trainer
from libra_ray.training.graph import is_graph
from libra_ray.training.loss_balance import GradientMeter
from libra_ray.training.parallel import check_sharded, draws
from libra_ray.training.saving import BackgroundSaver
from libra_ray.training.speed import COMMUNICATION, StepTimer
from tests.model import families
from tests.model.builders import make_batch, tiny_model
from tests.model.test_systems import FORMS
from tests.training.builders import training_data

CPU = torch.device("cpu")
KEYS = ("to_qkv.bias", "k_proj.bias")
"""What is added to all keys changes no attention: its gradient is rounding, which AdamW makes as large as any other."""
WORLD, STEPS, HALF = 2, 4, 2
EXACT = {"model.system": "regression"}
"""Without noise: what is drawn depends on the worker."""
RANDOM = {"train.augment_pixels": 2, "refiner.condition_dropout": 0.5, "train.balance_every": 1}
KINDS = {"exact": EXACT, "random": RANDOM}


def settings(backbone, kind, **more):
    """Small networks have weights that are single numbers, and no repeated layers; pretrained ones have layers."""
    return {"planner.backbone": "tiny" if kind == "random" else backbone, "train.precision": "fp32", **KINDS[kind], **more}


def batches(model):
    return [make_batch(model, 8, seed=step) for step in range(STEPS)]


def train(model, *, state=None, rank=0, world=1, until=STEPS):
    """The trainer after step `until`, and its rows, of this worker's share of every batch."""
    trainer = Trainer(model, device=CPU, state=state)
    rows = [progress.metrics for progress in trainer.run(own(model, rank, world)[trainer.step :], until=until)]
    return trainer, rows


def own(model, rank, world):
    """A worker's share of every batch."""
    return [batch.index(torch.arange(rank, len(batch), world)) for batch in batches(model)]


def saved(trainer, folder, *, rank=0, world=1):
    """Write the trainer's state to `folder`, and train on meanwhile."""
    with BackgroundSaver(trainer, training_data(trainer.model.config)) as saver:
        saver.begin(folder)
        list(trainer.run(own(trainer.model, rank, world)[trainer.step :]))
    return folder


@contextmanager
def counted():
    """How often each part of a step is noted."""
    found, note = Counter(), StepTimer._note

    def counting(timer, part):
        found[part] += 1
        note(timer, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimer, "_note", counting)
        yield found


def failing(trainer, folder, rank):
    """What every worker is told when one of them finds no room."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with BackgroundSaver(trainer, training_data(trainer.model.config)) as saver:
            saver.begin(folder)
            try:
                saver.wait()
            except NoRoomError as error:
                return str(error)
    return "nothing"


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_while_saving(trainer, folder, rank):
    """What the others are told when a worker is killed while it writes over an earlier checkpoint."""
    with BackgroundSaver(trainer, training_data(trainer.model.config)) as saver:
        saver.begin(folder)
    list(trainer.run(own(trainer.model, rank, WORLD)[trainer.step :]))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", half_a_file)
        try:
            with BackgroundSaver(trainer, training_data(trainer.model.config)) as saver:
                saver.begin(folder)
        except Exception as error:  # noqa: BLE001  (whichever it is)
            return repr(error)
    return "nothing"


def half_a_file(writer, plan, planner, write=HuggingFaceStorageWriter.write_data):
    write(writer, plan, planner).wait()
    (file, *_) = Path(writer.path).glob("shard-00002*")
    os.truncate(file, file.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_exporting(source, target):
    """One tensor is in the file, and others are not."""
    seen, read = [], shards._load

    def ending(*given):
        seen.append(given)
        if len(seen) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        read(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_load", ending)
        checkpoint.export(source, target)


def apart(trainer):
    """How far the workers are from one another in the weights that each has as a whole."""
    whole = [weight.master.flatten() for weight in trainer._weights.all if type(weight.parameter).__name__ != "DTensor"]
    if not whole:
        return 0.0
    mine = torch.cat(whole)
    all_of_them = [torch.empty_like(mine) for _ in range(WORLD)]
    distributed.all_gather(all_of_them, mine)
    return float((all_of_them[0] - all_of_them[1]).abs().max())


def work(rank, port, folder, backbone):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    share = partial(train, rank=rank, world=WORLD)
    found = {}
    for kind in KINDS:
        for how in ("ddp", "fsdp"):
            make = partial(tiny_model, settings(backbone, kind, **{"ray.parallel": how}))
            with counted() as waits:
                trainer, rows = share(make())
            half, _ = share(make(), until=HALF)
            averages = {name: value.clone() for name, value in half.weights().items()}
            written = saved(half, Path(folder) / f"{kind}-{how}", rank=rank, world=WORLD)
            resumed, _ = share(make(), state=checkpoint.load_trainer_state(written))
            fewer = checkpoint.load_trainer_state(Path(folder) / "one")
            grown = share(make(), state=fewer)[0].weights() if kind == "exact" else {}
            with trainer.averaged() as model:
                sharded = any(type(p).__name__ == "DTensor" for p in model.parameters())
                val = {name: float(value) for name, value in model(batches(model)[0], model.schedule().phase).terms.items()}
            found[kind, how] = {
                "weights": trainer.weights(),
                "resumed": resumed.weights(),
                "half": averages,
                "grown": grown,
                "rows": rows,
                "waits": waits[COMMUNICATION] / STEPS,
                "sharded": sharded,
                "val": val,
                "bytes": trainer.checkpoint_bytes(),
                "apart": apart(trainer),
            }
    told = failing(trainer, Path(folder) / "failed", rank)
    (Path(folder) / f"told{rank}").write_text(told)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    half, _ = share(make(), until=HALF)
    told = killed_while_saving(half, Path(folder) / "over", rank)
    (Path(folder) / "told of death").write_text(told)
    checkpoint.export(Path(folder) / "over", Path(folder) / "policy")
    killed_while_exporting(Path(folder) / "one", Path(folder) / "policy")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(families.write(tmp_path_factory.mktemp("hub") / "llava", families.FAMILIES["llava"]()))


@pytest.fixture(scope="module")
def found(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    saved(train(tiny_model(settings(backbone, "exact")), until=HALF)[0], folder / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    # A package from outside is called `tests` too.
    ours = "import sys, types; tests = sys.modules['tests'] = types.ModuleType('tests'); tests.__path__ = ['tests']; "
    call = ours + "from tests.training.test_parallel import work; work(int(sys.argv[1]), *sys.argv[2:])"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", call, str(rank), str(port), str(folder), backbone],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        for rank in range(WORLD)
    ]
    # Both end by being killed, one after the other, when all else is done.
    assert [worker.wait(timeout=240) for worker in workers] == [-signal.SIGKILL] * WORLD
    found = torch.load(folder / "found.pt", weights_only=False)
    return {case: {**of, "folder": folder} for case, of in found.items()}


def close(ones, others):
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        if name.endswith(KEYS):
            continue
        torch.testing.assert_close(one, others[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_learns_from_both_their_windows(found, backbone, how):
    alone, rows = train(tiny_model(settings(backbone, "exact")))
    close(found["exact", how]["weights"], alone.weights())
    for row, theirs in zip(rows, found["exact", how]["rows"], strict=True):
        for name in [name for name in row if name.startswith("grad_norm")]:
            assert theirs[name] == pytest.approx(row[name], rel=1e-3)


def test_what_every_worker_has_is_the_same_everywhere(found):
    """Also single numbers, which cannot be sharded."""
    assert {case: of["apart"] for case, of in found.items()} == dict.fromkeys(found, 0.0)


def test_only_shards_are_sharded(found):
    assert [found["exact", how]["sharded"] for how in ("ddp", "fsdp")] == [False, True]


def test_what_is_waited_for_others_is_told_apart(found, backbone):
    """Of all parts, which are no more than the whole; one worker waits for nobody."""
    parts = [f"{part}_share" for part in ("forward", "backward", "optimiser", "communication", "data_wait")]
    for (_, how), of in found.items():
        # Shards of every group are gathered, waited for, reduced, and waited for; replicas wait after the last gradient.
        assert of["waits"] == 1 if how == "ddp" else of["waits"] >= 4
        for row in of["rows"]:
            assert row["communication_share"] > 0
            assert sum(row[part] for part in parts) <= 1
            assert all(row[part] > 0 for part in parts[:3])
    _, rows = train(tiny_model(settings(backbone, "exact")), until=1)
    assert rows[0]["communication_share"] == 0


def test_shards_learn_what_replicas_learn(found):
    replicas, shards = found["random", "ddp"], found["random", "fsdp"]
    close(shards["weights"], replicas["weights"])
    assert shards["val"] == pytest.approx(replicas["val"], rel=1e-3)
    assert shards["bytes"] == replicas["bytes"]
    for ours, theirs in zip(shards["rows"], replicas["rows"], strict=True):
        names = [name for name in ours if name.startswith(("loss", "grad_norm"))]
        assert "grad_norm_loss_plan" in names
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-3)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_and_two_resumed_steps_are_four(found, kind, how):
    close(found[kind, how]["resumed"], found[kind, how]["weights"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_worker_goes_on_where_two_stopped(found, backbone, how):
    state = checkpoint.load_trainer_state(found["exact", how]["folder"] / f"exact-{how}")
    alone, _ = train(tiny_model(settings(backbone, "exact")), state=state)
    assert alone.step == STEPS
    close(alone.weights(), found["exact", how]["weights"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_workers_go_on_where_one_stopped(found, how):
    close(found["exact", how]["grown"], found["exact", how]["weights"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_every_worker_writes_its_share(found, how):
    """Of what all have, in DDP, each a part."""
    files = list((found["exact", how]["folder"] / f"exact-{how}" / "trainer").glob("*.safetensors"))
    sizes = [sum(path.stat().st_size for path in files if f"shard-{rank + 1:05d}" in path.name) for rank in range(WORLD)]
    assert min(sizes) > 0.3 * sum(sizes)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_average_as_it_was_when_the_save_began(found, tmp_path, kind, how):
    manifest = checkpoint.export(found[kind, how]["folder"] / f"{kind}-{how}", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "weights.safetensors")
    assert exported.keys() == found[kind, how]["half"].keys()
    assert all(torch.equal(value, found[kind, how]["half"][name]) for name, value in exported.items())
    assert (manifest.step, manifest.digest) == (HALF, checkpoint.digest(tmp_path / "exported"))


def test_what_one_worker_cannot_write_is_no_checkpoint_and_told_to_all(found):
    folder = found["exact", "fsdp"]["folder"]
    for rank in range(WORLD):
        assert "no space left on the disk" in (folder / f"told{rank}").read_text()
    assert not (folder / "failed").exists()


def test_a_worker_killed_while_it_writes_leaves_the_checkpoint_before(found):
    """It is whole, at its own step, and goes on; the others are told, and wait for nobody."""
    folder = found["exact", "fsdp"]["folder"]
    assert (folder / "told of death").read_text() != "nothing"
    state = checkpoint.load_trainer_state(folder / "over")
    assert state["step"] == HALF
    alone, _ = train(tiny_model(settings("", "random")), state=state)
    assert alone.step == STEPS


def test_a_process_killed_while_it_exports_leaves_the_policy_before(found):
    """And the next export is none the worse for what the killed one left."""
    folder = found["exact", "fsdp"]["folder"]
    before = checkpoint.read_manifest(folder / "policy")
    assert before.digest == checkpoint.digest(folder / "policy")
    assert checkpoint.read_config(folder / "policy").planner.backbone == "tiny", "of the first export"
    assert checkpoint.export(folder / "over", folder / "policy") == before


@pytest.mark.parametrize(
    "changes", [{"train.checkpointing": "selective"}, {"train.checkpointing": "full"}, {"train.accumulate": 4}]
)
def test_what_saves_memory_learns_the_same(backbone, changes):
    plain, rows = train(tiny_model(settings(backbone, "exact")))
    saving, same = train(tiny_model(settings(backbone, "exact", **changes)))
    close(saving.weights(), plain.weights())
    # AdamW would hide gradients of another size.
    for name in [name for name in rows[0] if name.startswith(("loss", "grad_norm"))]:
        assert [row[name] for row in same] == pytest.approx([row[name] for row in rows], rel=1e-3)


def test_losses_are_measured_over_all_pieces(backbone):
    """Each loss's own gradient, also on what both reach."""
    shared = {"refiner.vision": "shared", "refiner.max_staleness": 0, "refiner.noise_draws": 1}
    one, many = (
        train(tiny_model({**settings(backbone, "random"), **shared, **RESTFUL, "train.accumulate": count}), until=1)[1][0]
        for count in (1, 4)
    )
    names = [name for name in one if name.startswith(("grad_norm_loss", "grad_cosine"))]
    assert len(names) == 3
    assert many["grad_norm_loss_plan"] == pytest.approx(one["grad_norm_loss_plan"], rel=1e-3)


RESTFUL = {"train.augment_pixels": 0, "refiner.condition_dropout": 0.0}


def test_layers_of_pretrained_networks_are_found_once(backbone):
    model = tiny_model(settings(backbone, "exact"))
    found = pretrained_layers(model)
    assert len(found) == len(set(map(id, found))) == 4
    assert pretrained_layers(tiny_model()) == []


def test_large_matrices_are_kept_in_bf16_with_exact_masters(backbone, monkeypatch):
    """What is learned is what autocast would have made of fp32 weights."""
    exact = settings(backbone, "exact")
    changes = {**exact, "train.precision": "bf16"}
    by_autocast, rows = train(tiny_model(changes))
    in_fp32, _ = train(tiny_model(exact))
    monkeypatch.setattr(weights, "LARGE", 1)
    trainer, same = train(tiny_model(changes))
    kept = {value.dtype for value in trainer.model.state_dict().values() if value.is_floating_point()}
    assert kept == {torch.float32, torch.bfloat16}
    assert {value.dtype for value in trainer.weights().values()} == {torch.float32}
    assert [row["loss"] for row in same] == pytest.approx([row["loss"] for row in rows], rel=0.02)
    # As near as rounding lets it: a single weight without a gradient, a key's bias, goes wherever its processor rounds. Masters
    # that are rounded after each step lie 1.6 times as far off as fp32 does.
    assert distance(trainer, by_autocast) < 1.3 * distance(in_fp32, by_autocast)
    moved = tiny_model(changes).state_dict()
    assert any((value != moved[name]).any() for name, value in trainer.weights().items())
    again = Trainer(tiny_model(changes), device=CPU, state=trainer.state())
    for name, value in trainer.state()["model"].items():
        assert torch.equal(again.state()["model"][name], value)


def distance(one, other):
    """The norm of the difference of what two trainers have learned."""
    theirs = other.weights()
    return torch.stack([(value - theirs[name]).norm() for name, value in one.weights().items()]).norm()


def test_layers_that_drop_at_random_are_known(backbone):
    layer = pretrained_layers(tiny_model(settings(backbone, "exact")))[0]
    assert not draws(layer)
    layer.add_module("more", nn.Dropout(0.1))
    assert draws(layer)
    attention = next(
        module
        for module in pretrained_layers(tiny_model(settings(backbone, "exact")))[-1].modules()
        if hasattr(module, "attention_dropout")
    )
    attention.attention_dropout = 0.2
    assert draws(attention)


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match=r"train\.graph=step needs one worker on a CUDA device; give auto or none"):
        Trainer(tiny_model({"train.graph": "step"}), device=CPU)


def test_shards_are_never_captured(monkeypatch):
    """Nor those of one worker alone, which trains as it would among others."""
    monkeypatch.setattr("libra_ray.training.graph.on_gpu", lambda _: True)
    captured = partial(is_graph, device=torch.device("cuda"), world=1)
    assert [captured(how, sharded=False) for how in ("auto", "step", "none")] == [True, True, False]
    assert not captured("auto", sharded=True)
    with pytest.raises(ValueError, match=r"train\.graph=step cannot record what ray\.parallel=fsdp exchanges"):
        captured("step", sharded=True)


@pytest.mark.parametrize("form", [*FORMS.values(), {"refiner.vision": "shared"}], ids=[*FORMS, "libra_shared_vision"])
def test_what_no_shard_can_measure_is_known_of_the_model_alone(form):
    """Before any worker starts: exactly where the meter of sharded weights would not be able to measure."""
    model = tiny_model(form)
    model.config = override(model.config, {"ray.parallel": "fsdp", "train.balance": "gradient"})
    meter = GradientMeter({name: list(weights) for name, weights in model.reached().items()})
    if meter._sharing:
        with pytest.raises(ValueError, match=r"train\.balance=gradient cannot measure losses that share weights \(\w+ and \w+"):
            check_sharded(model)
    else:
        check_sharded(model)
    for allowed in ({"ray.parallel": "ddp"}, {"train.balance": "fixed"}, {"train.balance": "uncertainty"}):
        model.config = override(model.config, {"ray.parallel": "fsdp", "train.balance": "gradient", **allowed})
        check_sharded(model)
