# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own images, step by step
#
# {doc}`/own_images` says what to do and why. This page does it on a real folder: lay out the files, find a learning rate without touching the private
# images, train once, release, and use what was released as a stranger would.
#
# As nobody's photographs ship with the code, the folder is made on the spot: the handwritten digits of scikit-learn play the private images, the samples of the
# embedded generator the public synthetic ones. Give `folder` to use yours.

# %% tags=["parameters"]
folder = None  # your folder with train/CLASS/* and test/CLASS/*; None: one is made from the digits
model = "tiny-convnext"  # for photographs: "open_clip:ViT-B-16/laion2b_s34b_b88k"
eps = 2.0
delta = 1e-5  # far below one over the number of training images
method = "mix-self"
transform = None  # None: "crop" for the digits, as a mirrored digit is another digit; "crop-flip" for your folder
batch_size = 128
epochs = 4.0
learning_rate = None  # None: found on the public images in folder/synthetic/CLASS
learning_rates = [1.0, 2.0, 4.0, 8.0, 16.0]  # where it is looked for

# %% tags=["hide-input"]
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from IPython.display import Markdown
from myst_nb import glue
from safetensors.torch import load_file

from dpmix import models
from dpmix.companion import examples, plots, report
from dpmix.core import heads, views
from dpmix.images import data
from dpmix.runs import experiments

private = Path(
    tempfile.mkdtemp(prefix="dpmix-private-")
)  # results, decoded images and seeds stay here, not in the store

# %% [markdown]
# ## The folder

# %%
if folder is None:
    folder = examples.digits_folder(private / "photos")
    transform = transform or "crop"
splits = data.load(f"folder:{folder}", cache=private / "cache")
examples.folder_table(splits)

# %% [markdown]
# The names of the classes, the number of training images and their size become public with the release. The images of a folder may be mirrored by default;
# where that changes what they show, say `transform="crop"`.
#
# ## The learning rate, from public images
#
# A search on the private images would be a use of them that no accountant sees. So the search runs on images that are public anyway, as the private run will: the same
# encoder, recipe, ε and batch size, judged on a validation split of the public images.

# %%
recipe = replace(views.METHODS[method], transform=transform or "crop-flip")
spec = experiments.RunSpec(
    dataset=f"folder:{folder}",
    model=model,
    recipe=recipe,
    epsilon=eps,
    delta=delta,
    batch_size=batch_size,
    epochs=epochs,
    clip_norm=1.0,
    learning_rate=learning_rate or 1.0,
    validation=0.0,  # nothing left to choose: train on every image
    seed=None,  # fresh entropy
)
compute = experiments.ComputeFlags(cache=str(private / "cache"), progress=False)
store = experiments.Store(private / "runs")
if learning_rate is None:
    rehearsal = [replace(spec, train_on="synthetic", validation=0.2, seed=0, learning_rate=r) for r in learning_rates]
    tried = experiments.frame(experiments.run_all(rehearsal, compute=compute, store=store))
    best = experiments.choose_learning_rate(tried, ["dataset"])
    learning_rate = float(best["learning_rate"].iloc[0])
    spec = replace(spec, learning_rate=learning_rate)
    tried["accuracy on held-out public images (%)"] = tried["validation_accuracy"].round(1)
    public = tried.set_index("learning_rate")[["accuracy on held-out public images (%)"]]
else:
    public = Markdown(f"Taken as given: {learning_rate:g}.")
public

# %% [markdown]
# ## Train once

# %%
result = experiments.run(spec, compute=compute, store=store)
glue("own_eps", f"{eps:g}", display=False)
glue("own_delta", f"{delta:g}", display=False)
glue("own_accuracy", f"{100 * result.test_accuracy:.1f} %", display=False)
glue("own_rate", f"{learning_rate:g}", display=False)
report.provenance_note(experiments.frame([result]).assign(dataset=Path(folder).name, seed="withheld"))

# %% [markdown]
# With a learning rate of {glue:text}`own_rate` the last step classifies {glue:text}`own_accuracy` of the test images, at
# (ε, δ) = ({glue:text}`own_eps`, {glue:text}`own_delta`) for each training image. That accuracy is a statistic of the *test* images; publish it if their owners agree. One run
# with fresh entropy gives one number, another run another, and a second run on the same images would be a second release.
#
# ## Release
#
# Two files leave the house. The seed, the validation accuracy and the test accuracy are not in them.

# %%
where = experiments.release(result, private / "release", store=store)
card = json.loads((where / "privacy_card.json").read_text())
card = card.get("content", card)
examples.card_table(card)

# %% [markdown]
# ## Use it, as anybody may
#
# Whoever has the two files and the public encoder can classify. What was trained on private images is the linear head, nothing else. Images are
# brought to the encoder's size as they were in training (`image_size`): resized another way, a few would be classified differently.

# %%
released = load_file(where / "model.safetensors")
encoder = models.encoder(card["spec"]["model"])
splits = data.load(f"folder:{folder}", image_size=encoder.image_size, cache=private / "cache")  # as in training
features = heads.encode(encoder, splits.test.images)
scores = (features @ released["weight"].T + released["bias"]).softmax(dim=1)
agrees = (scores.argmax(dim=1) == splits.test.labels).double().mean().item()
assert abs(agrees - result.test_accuracy) < 1e-9, "the released head is not the one that was evaluated"
shown = range(0, len(splits.test), max(1, len(splits.test) // 12))

# %% tags=["hide-input"] mystnb={"image": {"alt": "A row of test images, each with the class that the released head gives to it"}}
names = splits.test.class_names
rows = [(f"{names[scores[i].argmax()]}  ({100 * scores[i].max():.0f} %)", i) for i in shown]
plots.picture_rows(
    [("What the released head says (softmax)", [splits.test.images[i] / 255 for _, i in rows], [r for r, _ in rows])]
)

# %% [markdown]
# *Some test images, the class that the released head gives to each and the softmax of that class.*
#
# ## Tidy up
#
# The seed is in the record of the run, so the record stays private: keep it where the images are, or destroy it.

# %%
examples.destroy(private)

# %% [markdown]
# ## Run it on yours
#
# ```console
# $ papermill notebooks/own_images.ipynb out.ipynb -p folder photos -p model open_clip:ViT-B-16/laion2b_s34b_b88k -p eps 2.0 -p delta 1e-6 -p learning_rate 1.0
# ```
#
# With `learning_rate` left out, `photos/synthetic/CLASS/` must hold public images of every class; {doc}`/data_and_models` says how to make them.
