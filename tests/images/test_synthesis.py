"""Public synthetic images: a text-to-image pipeline with random weights, killed and resumed; class names as words."""

import json
import shutil
import signal
import string
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpmix.images import data, synthesis

CLASSES = ["034.bicycle", "AnnualCrop", "a/bay"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """The folder of a Stable Diffusion pipeline of a few thousand random weights, with a tokenizer of single letters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    start, end = len(tokens) - 2, len(tokens) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def generate(pipeline, folder, **changes):
    wanted = dict(class_names=CLASSES, n_per_class=3, seed=5, steps=2, batch_size=4, progress=False) | changes
    return synthesis.generate(pipeline, folder=folder, **wanted)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory) -> Path:
    return generate(str(pipeline), tmp_path_factory.mktemp("made") / "out")


def test_an_image_folder_with_a_manifest(made, pipeline):
    names = [f"{folder}/{i:05d}.png" for folder in ("034.bicycle", "AnnualCrop", "a_bay") for i in range(3)]
    assert sorted(contents(made)) == sorted([*names, "manifest.json"])
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["prompts"]["AnnualCrop"] == "a photo of a annual crop"
    assert manifest["guidance_scale"] == 1.0 and manifest["steps"] == 2 and manifest["pipeline"] == str(pipeline)
    assert manifest["scheduler"]["name"] == "DDIMScheduler" and manifest["versions"]["diffusers"]
    assert manifest["seed"] == 5 and "drawn_again" not in manifest
    pictures = [np.asarray(Image.open(made / name)) for name in names]
    assert all(p.shape == (8, 8, 3) for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 9, "every image has its own noise"


def test_the_folder_is_what_data_reads(made, tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "pets").symlink_to(made)
    like = data.ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), tuple(CLASSES))
    found = data.public_images("pets", tmp_path, like=like, cache=tmp_path / "cache")
    assert found.labels.bincount().tolist() == [3, 3, 3] and found.images.shape == (9, 3, 8, 8)


def test_the_seed_and_the_class_decide_an_image(pipeline, made, tmp_path):
    again = generate(str(pipeline), tmp_path / "again")
    assert contents(again) == contents(made)
    other = generate(str(pipeline), tmp_path / "other", seed=6)
    assert (other / "a_bay/00000.png").read_bytes() != (made / "a_bay/00000.png").read_bytes()
    # an image keeps its seed whatever else is asked for
    alone = generate(str(pipeline), tmp_path / "alone", class_names=["a/bay"], n_per_class=1)
    one, same = (np.asarray(Image.open(f / "a_bay/00000.png")).astype(int) for f in (alone, made))
    assert np.abs(one - same).max() <= 1


def test_by_default_as_many_are_made_as_the_training_set_has(pipeline, made, tmp_path):
    labels = torch.tensor([0] * 5 + [1, 2])  # how many each class has must not show
    train = data.ImageSet(torch.zeros(7, 3, 8, 8, dtype=torch.uint8), labels, tuple(CLASSES))
    folder = generate(str(pipeline), tmp_path / "out", n_per_class=None, like=train)
    assert contents(folder) == contents(made), "seven images in three classes: three each"
    with pytest.raises(ValueError, match=r"n_per_class=None: give a number, or like=splits\.train"):
        generate(str(pipeline), tmp_path / "no", n_per_class=None)
    assert not (tmp_path / "no").exists()


def test_what_is_missing_is_made_again_and_nothing_else(pipeline, made, tmp_path):
    folder = generate(str(pipeline), tmp_path / "out")
    whole, lost = contents(folder), folder / "AnnualCrop/00002.png"
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if p.parent.name == "034.bicycle"}
    lost.unlink()
    generate(str(pipeline), folder)
    assert contents(folder) == whole == contents(made)
    untouched = [p for p, t in kept.items() if p.stat().st_mtime_ns == t]
    assert len(untouched) == 3, "batches that were complete are left alone"


def test_killed_in_the_middle_and_resumed(pipeline, tmp_path):
    folder = tmp_path / "out"
    asked = dict(class_names=["cat", "dog"], n_per_class=20, seed=1, steps=2, batch_size=2, progress=False)
    code = f"from dpmix.images import synthesis; synthesis.generate({str(pipeline)!r}, folder={str(folder)!r}, **{asked!r})"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.rglob("*.png"))) < 5:
            assert run.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    early = contents(folder)
    assert 5 <= len([n for n in early if n.endswith(".png")]) < 40
    synthesis.generate(str(pipeline), folder=folder, **asked)
    straight = synthesis.generate(str(pipeline), folder=tmp_path / "straight", **asked)
    pictures = {n: b for n, b in contents(folder).items() if not n.endswith(".tmp")}
    assert pictures == contents(straight)
    assert all(pictures[n] == b for n, b in early.items() if not n.endswith(".tmp"))


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from dpmix.images import synthesis
torch.set_num_threads(1)
folder, chance = Path(sys.argv[2]), random.Random(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
asked = dict(class_names=["cat", "dog"], n_per_class=12, seed=1, steps=2, batch_size=2, progress=False)

def child(name):
    pid = os.fork()
    if pid:
        return pid
    try:
        synthesis.generate(pipe, folder=folder / name, **asked)
        os._exit(0)
    finally:
        os._exit(1)

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert end(child("calm")) == 0
took, statuses, counts = time.monotonic() - began, [], []
made = lambda: len(list((folder / "killed").rglob("*.png")))
for _ in range(6):
    pid, wanted = child("killed"), made() + chance.randint(0, 2)
    while made() < wanted:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 1) * took / 24)
    os.kill(pid, signal.SIGKILL)
    statuses.append(end(pid))
    counts.append(made())
assert end(child("killed")) == 0
read = lambda name: {str(p.relative_to(folder / name)): p.read_bytes() for p in (folder / name).rglob("*")
                     if p.is_file() and p.suffix != ".tmp"}
assert read("killed") == read("calm")
print(json.dumps([statuses, counts]))
"""


def test_killed_at_random_moments_again_and_again(pipeline, tmp_path):
    command = [sys.executable, "-c", KILLS, str(pipeline), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    statuses, counts = json.loads(run.stdout.splitlines()[-1])
    assert statuses.count(-9) >= 3 and counts == sorted(counts), "kills fell into the work, and nothing was lost"


def test_class_names_stay_in_their_folder(pipeline, tmp_path):
    for name in ("..", ".", ""):
        with pytest.raises(ValueError, match=r"class_names=.*cannot name a folder"):
            generate(str(pipeline), tmp_path / "out", class_names=["a", name])
    assert not (tmp_path / "out").exists()
    folder = generate(str(pipeline), tmp_path / "out", class_names=["../../up", "/etc"], n_per_class=1)
    assert sorted(contents(folder)) == [".._.._up/00000.png", "_etc/00000.png", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_damaged_is_named(pipeline, made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "synthetic" / "pets"))
    picture = folder / "AnnualCrop" / "00001.png"
    whole = picture.read_bytes()
    like = data.ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), tuple(CLASSES))
    for damaged in (whole[: len(whole) // 2], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        picture.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"1 of 9 images cannot be decoded: 'AnnualCrop/00001\.png'"):
            data.public_images("pets", tmp_path, like=like, cache=tmp_path / "cache")
    picture.unlink()
    generate(str(pipeline), folder)
    assert contents(folder) == contents(made)
    for damaged in ("", "[1, 2]", "{"):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(
            ValueError, match=r"folder='.*pets': (its manifest\.json is damaged|holds images of another)"
        ):
            generate(str(pipeline), folder)


@pytest.mark.parametrize(
    "change",
    [dict(seed=6), dict(steps=3), dict(prompt="a drawing of a {}"), dict(n_per_class=2), dict(guidance_scale=7.5)],
)
def test_a_manifest_of_another_run_is_refused_by_name(pipeline, made, change):
    before = contents(made)
    with pytest.raises(
        ValueError, match=rf"holds images of another run \(.*{next(iter(change))} .*choose another folder"
    ):
        generate(str(pipeline), made, **change)
    assert contents(made) == before


def test_other_weights_are_another_run_and_another_place_is_not(pipeline, made):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(pipeline))
    generate(pipe, made)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"another run \(weights "):
        generate(pipe, made)


def test_guidance_is_off_unless_asked_for(pipeline, made, tmp_path):
    guided = generate(str(pipeline), tmp_path / "guided", guidance_scale=7.5)
    assert contents(guided)["a_bay/00000.png"] != contents(made)["a_bay/00000.png"]


class Failing:
    """A pipeline whose safety checker blackens, or whose decoder spoils, the second image of its first calls."""

    def __init__(self, pipe, how, calls=1):
        self.pipe, self.how, self.left = pipe, how, calls

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def to(self, *args, **kwargs):
        return self

    def __call__(self, *args, **kwargs):
        out = self.pipe(*args, **kwargs)
        out.nsfw_content_detected = [False] * len(out.images)
        if self.left and len(out.images) > 1:
            self.left -= 1
            out.nsfw_content_detected[1] = self.how == "flagged"
            if self.how == "black":
                out.images[1] = 0
            if self.how == "nan":
                out.images[1, 2, 3, 0] = np.nan
        return out


@pytest.mark.parametrize("how", ["flagged", "black", "nan"])
def test_images_that_failed_are_drawn_again_with_another_key(pipeline, made, tmp_path, how):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(pipeline))
    with pytest.warns(UserWarning, match=r"drawn again with another key: 1 image .*, such as 034.bicycle/00001\.png"):
        folder = generate(Failing(pipe, how), tmp_path / "out")
    found, whole = contents(folder), contents(made)
    changed = {name for name in whole if found[name] != whole[name]}
    assert changed == {"034.bicycle/00001.png", "manifest.json"}
    assert np.asarray(Image.open(folder / "034.bicycle/00001.png")).std() > 1
    assert json.loads(found["manifest.json"])["drawn_again"] == {"034.bicycle/00001.png": 1}
    (folder / "034.bicycle/00000.png").unlink()  # resuming meets the same failure, and makes the same images
    with pytest.warns(UserWarning, match="drawn again"):
        generate(Failing(pipe, how), folder)
    assert contents(folder) == found


def test_what_always_fails_ends_with_a_word(pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(pipeline))
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(
        RuntimeError, match=r"034\.bicycle/00000\.png: 8 draws in a row were blackened .* or not finite"
    ):
        generate(pipe, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_bad_input_is_one_line(pipeline, tmp_path):
    bad = [
        (dict(class_names=[]), "class_names="),
        (dict(class_names=["a/b", "a_b"]), "class_names=.*must differ"),
        (dict(prompt="a photo"), "prompt='a photo': must hold one"),
        (dict(n_per_class=0), "n_per_class=0: must be a whole number"),
        (dict(steps=0), "steps=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(guidance_scale=0.0), "guidance_scale=0.0.*1 is without guidance"),
    ]
    for change, said in bad:
        with pytest.raises(ValueError, match=said) as caught:
            generate(str(pipeline), tmp_path / "out", **change)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"pipeline='nobody/nothing': .*hf download nobody/nothing"):
        generate("nobody/nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="pipeline='int': must be a pipeline of diffusers"):
        generate(3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be empty or hold a manifest\.json, has holiday\.png"):
        generate(str(pipeline), tmp_path / "used")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("034.bicycle", "bicycle"),
        ("224.touring-bike", "touring bike"),
        ("251.airplanes-101", "airplanes"),
        ("253.faces-easy-101", "faces easy"),
        ("001.ak47", "ak47"),
        ("AnnualCrop", "annual crop"),
        ("HerbaceousVegetation", "herbaceous vegetation"),
        ("apartment_building/outdoor", "apartment building outdoor"),
        ("American Bulldog", "american bulldog"),
        ("maple_tree", "maple tree"),
        ("7", "7"),
        ("101", "101"),
    ],
)
def test_class_names_become_words(name, said):
    assert synthesis.words(name) == said


def test_no_global_random_state_is_touched(pipeline, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        generate(str(pipeline), tmp_path / "out", n_per_class=1)
    assert torch.equal(before, torch.get_rng_state())
