"""Training a network: the mechanism to the letter; runs that survive kills, other physical batches and processes."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dpmix.core import accounting, files, network, processes, rng, views
from dpmix.core.clipping_network import clipped_gradient_sum
from dpmix.models.wide_resnet import wide_resnet

RECIPE = views.Recipe(k_base=2, k_self=1, transform="crop")


def data(n=12, side=8, seed=0):
    draws = np.random.default_rng(seed)
    images = torch.from_numpy(draws.integers(0, 256, (n, 1, side, side), dtype=np.uint8))
    return images, torch.from_numpy(draws.integers(0, 3, n))


def small(seed=1):
    return wide_resnet(10, 1, 3, channels=1, seed=seed)


def tiny(seed=1):
    torch.random.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


SETTINGS = dict(
    recipe=RECIPE, num_classes=3, clip_norm=0.5, noise_multiplier=1.0, learning_rate=0.3, expected_batch=6,
    sample_rate=0.5, steps=4, seed=7, progress=False,
)  # fmt: skip


def train(model=None, **changes):
    model = tiny() if model is None else model
    images, labels = changes.pop("data", None) or data()
    return network.train(model, images, labels, **(SETTINGS | changes))


@pytest.fixture
def noises(monkeypatch):
    """The noise of each step of a run, by parameter: standard normal, as it was drawn."""
    kept = []

    def spy(parameters, deviation, **where):
        flat = draw(parameters, deviation, **where)
        sizes = [p.numel() for p in parameters.values()]
        kept.append({n: part / deviation for n, part in zip(parameters, flat.split(sizes), strict=True)})
        return flat

    draw = network.noise_of
    monkeypatch.setattr(network, "noise_of", spy)
    return kept


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# The mechanism.


@pytest.fixture
def streams(monkeypatch):
    """The names of the noise streams that runs use, one a step."""
    seen, real = [], network.noise_of

    def recorded(*args, **kwargs):
        seen.append(kwargs["identity"])
        return real(*args, **kwargs)

    monkeypatch.setattr(network, "noise_of", recorded)
    return seen


def test_a_run_equals_the_algorithm_written_out(streams):
    images, labels = data()
    options = dict(momentum=0.9, weight_decay=0.1, ema_decay=0.3)
    got = train(small().double(), **options)
    model = small().double()
    parameters = dict(model.named_parameters())
    velocity = {n: torch.zeros_like(p) for n, p in parameters.items()}
    ema = {n: p.detach().clone() for n, p in parameters.items()}
    seen = 0
    for t in range(4):
        ids = accounting.poisson_batch(12, 0.5, seed=7, step=t)
        made = views.make_views(images[ids], labels[ids], ids, RECIPE, num_classes=3, seed=7, step=t)
        total = clipped_gradient_sum(model, made.images.double(), made.targets, 0.5).grads
        seen += len(ids)
        with torch.no_grad():
            for n, p in parameters.items():
                draws = rng.generator(7, "noise", t, streams[t], n).standard_normal(p.numel())
                noise = torch.from_numpy(draws).view(p.shape)
                velocity[n] = 0.9 * velocity[n] + (total[n] + 1.0 * 0.5 * noise) / 6
                p -= 0.3 * velocity[n]
                p *= 1 - 0.3 * 0.1
                decay = min(0.3, (1 + t) / (10 + t))
                ema[n] = decay * ema[n] + (1 - decay) * p
    for n, p in parameters.items():
        torch.testing.assert_close(got.state[n], p.detach())
        torch.testing.assert_close(got.ema_state[n], ema[n])
    assert got.steps == 4 and got.engine == "loop" and got.resumed_from == 0
    assert got.counters["examples"] == seen and got.counters["views"] == 3 * seen and got.counters["non_finite"] == 0


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_physical_batch_and_engine_do_not_matter(engine):
    want = train(small())
    for physical_batch in (1, 5):
        got = train(small(), physical_batch=physical_batch, engine=engine)
        assert got.engine == engine
        if engine == "loop":
            assert same(got.state, want.state)  # to the last bit
        for n in want.state:
            torch.testing.assert_close(got.state[n], want.state[n], rtol=1e-4, atol=1e-5)


def test_an_empty_step_still_adds_noise_and_counts(streams):
    before = {n: t.clone() for n, t in tiny().state_dict().items()}
    got = train(sample_rate=1e-9, steps=1)
    assert got.counters["examples"] == 0
    for n, t in got.state.items():
        draws = rng.generator(7, "noise", 0, streams[0], n).standard_normal(t.numel())
        noise = torch.from_numpy(draws).view(t.shape)
        torch.testing.assert_close(t, (before[n] - 0.3 * 0.5 * noise / 6).float())


def fits(draws, deviation):
    """Does the sample fit N(0, deviation^2)? A chi-square interval; false alarms once in some 10^5 runs."""
    n = len(draws)
    ratio = float(draws.double().square().sum()) / deviation**2
    return abs(ratio - n) < 4.4 * (2 * n) ** 0.5


@pytest.mark.parametrize(("microbatch", "times"), [(1, 1.0), (2, 2.0)])
def test_noise_has_the_stated_deviation_and_no_other(microbatch, times):
    """For microbatches, 2 C: noise for C is the wrong algorithm of Table 1's left-out row."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30))
    before = model[1].weight.detach().clone()
    got = train(model, num_classes=30, sample_rate=1e-9, steps=1, microbatch=microbatch, noise_multiplier=1.7)
    noise = (before - got.state["1.weight"]).flatten() * 6 / 0.3
    deviation = 1.7 * 0.5 * times
    assert fits(noise, deviation)
    assert not fits(noise, deviation * 2 / 3) and not fits(noise, deviation * 3 / 2)


def test_noise_differs_between_steps_seeds_and_parameters():
    parameters = dict(tiny().named_parameters())
    a = network.noise_of(parameters, 1.0, seed=1, step=0)
    assert a.dtype == torch.float64 and torch.equal(a, network.noise_of(parameters, 1.0, seed=1, step=0))
    assert not torch.equal(a, network.noise_of(parameters, 1.0, seed=1, step=1))
    assert not torch.equal(a, network.noise_of(parameters, 1.0, seed=2, step=0))
    assert not torch.equal(a, network.noise_of(parameters, 1.0, seed=1, step=0, identity="another run"))
    assert not torch.equal(a, network.noise_of(parameters, 1.0, seed=1, step=0, identity="other"))
    assert a.unique().numel() == a.numel()


def test_runs_share_noise_only_as_neighbours(streams):
    """Releases with one seed must not cancel each other's noise; neighbouring data sets are compared draw by draw."""
    train(steps=1)
    train(steps=1, learning_rate=0.2)
    train(steps=1, recipe=views.Recipe(k_base=2, transform="crop"))
    train(steps=1, data=tuple(t[:-1] for t in data()))
    assert len(set(streams[:3])) == 3 and streams[3] == streams[0]


def test_runs_with_other_settings_and_one_seed_do_not_share_noise(noises):
    train(sample_rate=1e-9, steps=1)
    train(sample_rate=1e-9, steps=1, learning_rate=0.2)
    assert all(not torch.equal(a, b) for a, b in zip(noises[0].values(), noises[1].values(), strict=True))


def test_bfloat16_rounds_gradients_and_neither_noise_nor_weights():
    about = dict(steps=2, momentum=0.9, ema_decay=0.5)
    assert same(train(sample_rate=1e-9, **about).state, train(sample_rate=1e-9, autocast=torch.bfloat16, **about).state)
    exact, rough = train(sample_rate=1.0, **about), train(sample_rate=1.0, autocast=torch.bfloat16, **about)
    assert all(t.dtype == torch.float32 for t in rough.state.values()) and not same(exact.state, rough.state)
    for n, t in exact.state.items():
        torch.testing.assert_close(rough.state[n], t, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("mix", ["none", "add", "replace"])
def test_microbatches_train(mix):
    got = train(small(), microbatch=2, microbatch_mix=mix, expected_batch=3, steps=2, data=data(11))
    again = train(small(), microbatch=2, microbatch_mix=mix, expected_batch=3, steps=2, data=data(11), physical_batch=1)
    assert same(got.state, again.state) and got.counters["examples"] > 0
    assert all(t.isfinite().all() for t in got.state.values())
    if mix != "none":
        other = train(small(), microbatch=2, expected_batch=3, steps=2, data=data(11))
        assert not same(got.state, other.state)


def test_a_loss_that_is_not_finite_is_dropped_and_counted():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, x):
            return self.inner(x) / (x.amax((1, 2, 3)) > 0)[:, None]  # 0 / 0 for a black image

    images, labels = data()
    images[3] = 0
    got = train(Poisoned(), data=(images, labels), sample_rate=1.0, steps=2)
    assert got.counters["non_finite"] == 2
    assert all(t.isfinite().all() for t in got.state.values())


def test_frozen_parameters_stay():
    model = tiny()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    got = train(model, ema_decay=0.9)
    assert torch.equal(got.state["0.weight"], before) and torch.equal(got.ema_state["0.weight"], before)
    assert not torch.equal(got.state["4.weight"], got.ema_state["4.weight"])


def test_no_global_random_state_is_touched():
    model = tiny()
    before = torch.get_rng_state()
    train(model, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_accuracy():
    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3))], 1) * self.scale

    images = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).view(4, 1, 1, 1)
    assert network.accuracy(Right(), images, torch.tensor([0, 1, 0, 0])) == 0.75
    assert np.isnan(network.accuracy(Right(), images[:0], torch.zeros(0, dtype=torch.int64)))


def test_the_bar_shows_the_epsilon_so_far(capsys):
    train(steps=2, delta=1e-5, progress=True)
    spent = accounting.epsilon_spent(noise_multiplier=1.0, delta=1e-5, sample_rate=0.5, steps=2)
    assert f"ε = {spent:.2f}" in capsys.readouterr().err


def test_fresh_entropy():
    assert not same(train(seed=None, steps=1).state, train(seed=None, steps=1).state)


# Checkpoints.


def interrupted(path, at, **changes):
    real = network._Run.clipped_sum

    def stop(run):
        if run.state.step == at:
            raise KeyboardInterrupt
        return real(run)

    with mock.patch.object(network._Run, "clipped_sum", stop), pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, **changes)


FULL = dict(momentum=0.9, ema_decay=0.9, weight_decay=0.01, steps=6)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(1, 5), every=st.integers(1, 7))
def test_ctrl_c_then_resume_is_bit_for_bit(tmp_path_factory, at, every):
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    want = train(**FULL)
    interrupted(path, at, checkpoint_every=every, **FULL)
    got = train(checkpoint=path, **FULL)
    assert got.resumed_from == at
    assert same(got.state, want.state) and same(got.ema_state, want.ema_state) and got.counters == want.counters


def test_a_signal_in_the_middle_of_a_step(tmp_path, monkeypatch):
    real, calls = views.make_views, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(views, "make_views", signalled)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, **FULL)
    monkeypatch.undo()
    got = train(checkpoint=path, **FULL)
    assert 0 < got.resumed_from < 6 and same(got.state, train(**FULL).state)


def test_a_finished_run_is_not_run_again(tmp_path):
    path = tmp_path / "run.safetensors"
    first = train(checkpoint=path)
    assert files.load_tensors(path)[1]["step"] == 4
    again = train(checkpoint=path)
    assert again.resumed_from == 4 and same(first.state, again.state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(clip_norm=0.25), r"clip_norm: 0\.5 there, 0\.25 here"),
        (dict(seed=8), r"seed \(digest\)"),
        (dict(recipe=views.Recipe(k_base=3)), "recipe:"),
        (dict(spec={"data": "other"}), "data: 'one' there, 'other' here"),
        (dict(steps=9), "steps: 4 there, 9 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, said):
    path = tmp_path / "run.safetensors"
    train(checkpoint=path, spec={"data": "one"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another run .*{said}"):
        train(checkpoint=path, **({"spec": {"data": "one"}} | change))
    with pytest.raises(ValueError, match="model:"):
        train(small(), checkpoint=path, spec={"data": "one"})
    assert path.read_bytes() == before


def test_other_compute_settings_only_warn(tmp_path):
    path = tmp_path / "run.safetensors"
    interrupted(path, 2)
    with pytest.warns(UserWarning, match="physical_batch: 64 there, 3 here"):
        train(checkpoint=path, physical_batch=3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "meta"])
def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    interrupted(path, 5, checkpoint_every=2, **FULL)
    whole = path.read_bytes()
    if damage == "bit":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "meta":
        path.write_bytes(whole.replace(b'\\"step\\": 5', b'\\"step\\": 4'))
    else:
        path.write_bytes(whole[: {"truncated": len(whole) // 2, "empty": 0}[damage]])
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match=r"checkpoint=.*damaged .*; remove it to start afresh"):
        train(checkpoint=path, **FULL)


def test_what_is_no_checkpoint_is_said(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"damaged .*; remove it to start afresh"):
        train(checkpoint=path)
    save_file({"weights": torch.zeros(3)}, path)  # whole, but not one of ours
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"damaged .it cannot be read, KeyError"):
        train(checkpoint=path)
    assert path.read_bytes() == before, "somebody's weights are not written over"


def test_nothing_is_left_lying_about(tmp_path):
    path = tmp_path / "deep" / "run.safetensors"
    train(checkpoint=path, checkpoint_every=1)
    assert sorted(p.name for p in path.parent.iterdir()) == ["run.safetensors"]


def script(text, folder):
    """A file that imports this module's helpers; run with one thread, because it forks."""
    path = folder / "script.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(text))
    return path


def environment():
    root = str(Path(__file__).parents[2])
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


def test_kill_minus_nine_at_any_moment(tmp_path):
    """Children killed after a random time, or inside a write, again and again until one finishes."""
    text = f"""
        import os, random, signal, time, torch
        from pathlib import Path
        from safetensors.torch import save_file
        import test_network
        from dpmix.core import files
        torch.set_num_threads(1)
        path, kills, inside = Path({str(tmp_path / "run.safetensors")!r}), 0, 0
        chance = random.Random(0)
        while True:
            child = os.fork()
            if child == 0:
                real, plan = files.write, chance.choice(["time", "write", "rename", "rename"])
                at, calls = chance.randint(1, 2), []
                def die(): os.kill(os.getpid(), signal.SIGKILL)
                def half_written(target, whole, **how):
                    calls.append(1)
                    if plan == "write" and len(calls) == at:
                        target.with_name(f".{{target.name}}.x.tmp").write_bytes(whole[: chance.randrange(len(whole))])
                        die()
                    return real(target, whole, **how)
                files.write = half_written
                renames, rename = [], Path.replace
                def replace(self, target):
                    renames.append(1)
                    if plan == "rename" and len(renames) == at: die()
                    return rename(self, target)
                Path.replace = replace
                got = test_network.train(checkpoint=path, checkpoint_every=1, **(test_network.FULL | dict(steps=12)))
                save_file(got.state, path.with_name("final.safetensors"))
                os._exit(0)
            for _ in range(chance.randint(1, 3)): chance.random()  # the next child makes another plan
            deadline = time.monotonic() + chance.uniform(0.05, 0.4)
            while time.monotonic() < deadline and (done := os.waitpid(child, os.WNOHANG)) == (0, 0): time.sleep(0.005)
            if done == (0, 0):
                os.kill(child, signal.SIGKILL)
                done = os.waitpid(child, 0)
            if os.WIFSIGNALED(done[1]):
                kills += 1
                continue
            assert os.WEXITSTATUS(done[1]) == 0, done
            break
        print("kills", kills)
    """
    run = subprocess.run(
        [sys.executable, script(text, tmp_path)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(re.search(r"kills (\d+)", run.stdout)[1]) >= 3  # else nothing was tried
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the script: sums over more threads may round differently
    want = train(**(FULL | dict(steps=12)))
    torch.set_num_threads(threads)
    assert same(load_file(tmp_path / "final.safetensors"), want.state)


def test_each_process_takes_its_own_gpu_before_the_group_is_made(monkeypatch):
    """NCCL sends through the GPU that is current: with the default one, all processes would share the first."""
    told = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: "nccl" in told)
    monkeypatch.setattr(processes.dist, "init_process_group", told.append)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    assert processes.processes("cuda") == (1, 2)
    assert told == ["cuda:1", "nccl"]


def test_two_processes_equal_one(tmp_path):
    text = f"""
        import torch, test_network
        import torch.distributed as dist
        from safetensors.torch import save_file
        path = {str(tmp_path / "run.safetensors")!r}
        options = test_network.FULL | dict(physical_batch=2)
        test_network.train(checkpoint=path, checkpoint_every=3, **(options))
        got = test_network.train(checkpoint=path, **options)
        assert got.resumed_from == 6 and dist.get_world_size() == 2
        examples = torch.tensor(got.counters["examples"])
        save_file(got.state | {{"examples": examples}}, path + f".{{dist.get_rank()}}")
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    run = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script(text, tmp_path))],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, second = (load_file(f"{tmp_path / 'run.safetensors'}.{rank}") for rank in (0, 1))
    assert same(first, second)
    want = train(**FULL)
    assert int(first.pop("examples")) == want.counters["examples"]
    for n, t in want.state.items():
        torch.testing.assert_close(first[n], t, rtol=1e-4, atol=1e-6)


# Faults and bad input.


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_says_what_to_try(tmp_path, monkeypatch, fault):
    def full(*args, **kwargs):
        raise fault

    monkeypatch.setattr(views, "make_views", full)
    with pytest.raises(MemoryError, match="physical_batch=64: out of memory on cpu; try physical_batch=32"):
        train()
    with pytest.raises(MemoryError, match="one example alone do not fit"):
        train(physical_batch=1)
    monkeypatch.setattr(views, "make_views", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        train()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(physical_batch=0), "physical_batch=0: must be a whole number of at least 1"),
        (dict(steps=-1), "steps=-1"),
        (dict(clip_norm=0.0), r"clip_norm=0\.0"),
        (dict(noise_multiplier=-1.0), r"noise_multiplier=-1\.0"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(expected_batch=0), "expected_batch=0"),
        (dict(sample_rate=1.5), r"sample_rate=1\.5"),
        (dict(momentum=1.0), r"momentum=1\.0"),
        (dict(ema_decay=-0.1), r"ema_decay=-0\.1"),
        (dict(num_classes=2), "num_classes=2: the labels go from 0 to 2"),
        (dict(num_classes=4), "num_classes=4: the model answers three images with shape"),
        (dict(engine="gruoped"), "did you mean 'grouped'"),
        (dict(microbatch=3, microbatch_mix="add"), "microbatch=3: must be 2"),
        (dict(microbatch_mix="mix"), "microbatch_mix='mix'"),
        (dict(seed=None, checkpoint="x"), "seed=None"),
        (dict(data=(data()[0], data()[1][:5])), "labels=5: must be as many as the images, 12"),
        (dict(data=data(side=4)), "does not take images of shape"),
        (dict(model=nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))), "'0' is BatchNorm2d"),
        (dict(model=nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 3))), "not keyed; set p=0"),
        (dict(delta=2.0), r"delta=2\.0: must lie strictly between 0 and 1"),
        (dict(clip_norm=1e-25), "clip_norm=1e-25: must be at least 1e-12"),
    ],
)
def test_bad_input_is_refused_before_any_work(bad, said, monkeypatch):
    monkeypatch.setattr(views, "make_views", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(ValueError, match=said) as caught:
        train(**bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("there", [torch.cuda.is_available()])
def test_a_gpu_that_is_not_there(there):
    if there:
        assert train(device="cuda").engine == "grouped"
    else:
        with pytest.raises(ValueError, match="there is no GPU"):
            train(device="cuda")


# Places, streams, buffers.


def test_vacating_a_place_changes_one_microbatch():
    ids = torch.arange(201)
    whole = network.micro.microbatch_partition(201, 2, seed=3, ids=ids)
    less_ids = ids[ids != 8]
    less = network.micro.microbatch_partition(201, 2, seed=3, ids=less_ids)
    named = [
        [{int(t[i]) if i >= 0 else None for i in row} for row in table] for table, t in ((whole, ids), (less, less_ids))
    ]
    changed = [(a, b) for a, b in zip(*named, strict=True) if a != b]
    assert len(changed) == 1 and 8 in changed[0][0] and changed[0][1] == changed[0][0] - {8} | {None}
    renumbered = network.micro.microbatch_partition(200, 2, seed=3)
    assert sum(set(a.tolist()) != set(b.tolist()) for a, b in zip(whole, renumbered, strict=False)) > 50, (
        "not so without places"
    )
    with pytest.raises(ValueError, match=r"ids=1: must be places in 0..200"):
        network.micro.microbatch_partition(201, 2, seed=3, ids=torch.tensor([201]))


@pytest.mark.parametrize("microbatch", [1, 2])
def test_names_and_places_are_those_of_the_examples(microbatch):
    images, labels = data()
    ids = torch.arange(12) * 2
    about = dict(noise_multiplier=0.0, sample_rate=1.0, steps=1, microbatch=microbatch, places=24)
    order = torch.tensor([5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10])
    one = train(ids=ids, **about)
    other = train(data=(images[order], labels[order]), ids=ids[order], **about)
    for name in one.state:
        torch.testing.assert_close(one.state[name], other.state[name])
    unnamed = train(data=(images[order], labels[order]), **about)
    assert any(not torch.allclose(one.state[name], unnamed.state[name]) for name in one.state), "the order would tell"


def test_identities_keep_noise_apart(noises):
    train(steps=1)
    train(steps=1, identity="other data")
    train(steps=1)
    first, second, third = (torch.cat([t.reshape(-1) for t in drawn.values()]) for drawn in noises)
    assert torch.equal(first, third) and abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.5


class Remembers(nn.Module):
    """Keeps the largest pixel that it has seen."""

    def __init__(self):
        super().__init__()
        self.inner = tiny()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        self.largest = torch.maximum(self.largest, x.detach().max() * 2)
        return self.inner(x)


def test_a_buffer_that_follows_the_images_is_refused():
    with pytest.raises(ValueError, match="model: 'largest' changes while private images pass"):
        train(Remembers(), sample_rate=1.0)


class Tied(nn.Module):
    """One weight under two names, and (`kept`) something beside its tensors."""

    def __init__(self, kept=None):
        super().__init__()
        self.kept, self.first, self.second, self.head = kept, nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


class OnlyTied(Tied):
    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


def test_tied_weights_are_trained_and_averaged_as_one():
    torch.random.manual_seed(0)
    got = train(OnlyTied(), ema_decay=0.9)
    for state in (got.state, got.ema_state):
        assert torch.equal(state["first.weight"], state["second.weight"])
    assert not torch.equal(got.state["first.weight"], got.ema_state["first.weight"])


def test_what_is_no_tensor_is_not_released():
    with pytest.raises(ValueError, match="model='_extra_state': is no tensor"):
        train(Tied("a word"))


def test_a_checkpoint_knows_whose_labels_and_names_it_was_made_of(tmp_path):
    images, labels = data()
    train(checkpoint=tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match="labels and ids"):
        train(checkpoint=tmp_path / "run", steps=4, data=(images, labels.flip(0)))


def test_processes_that_were_given_shares_of_the_data_are_refused(tmp_path):
    """As a script for DistributedDataParallel would do it: each its own half."""
    text = """
        import os, test_network
        images, labels = test_network.data()
        half = slice(int(os.environ["RANK"]), None, 2)
        test_network.train(data=(images[half], labels[half]))
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    run = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script(text, tmp_path))],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode and "the processes see other examples; each process is given all of them" in run.stderr


class Keeps(nn.Module):
    """Keeps a buffer: `kept` says which."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.inner = kept, tiny()
        if kept == "no numbers":
            self.register_buffer("place", torch.full((2,), torch.nan), persistent=False)

    def forward(self, x):
        if self.kept == "pixels" and torch.is_grad_enabled():
            self.register_buffer("seen", x.detach().clone())
        if self.kept == "size of the batch":
            self.register_buffer("mask", torch.ones(len(x)), persistent=False)
        return self.inner(x)


def test_a_buffer_that_appears_later_is_refused_and_what_is_harmless_is_not():
    with pytest.raises(ValueError, match="model: 'seen' changes while private images pass, and would be released"):
        train(Keeps("pixels"))
    for harmless in ("no numbers", "size of the batch"):
        assert train(Keeps(harmless)).state
