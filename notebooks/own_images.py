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
# **Once executed, this notebook is private**: it counts and names images, and shows what the test images say of the model. What may leave the house is
# the folder `out`, nothing else.
#
# {doc}`Your own images </own_images>` says what to decide and why. This page does it on a real folder: check, train, predict. As nobody's photographs ship with the code,
# the folder is made on the spot: the handwritten digits of scikit-learn play the private images, samples of the embedded generator the public synthetic
# ones. Give `folder` to use yours. Everything left at `None` takes the recommended value, which `check` names with its reason.

# %% tags=["parameters"]
folder = None  # your folder with train/CLASS/* and test/CLASS/*, or CLASS/* alone; None: one is made from the digits
out = None  # the release; None: FOLDER-release beside the folder
eps = 2.0
delta = None  # None: 1e-5, or less where there are many images
method = None  # None: what is recommended; "dp-sgd", "self-aug", "mix-self", "mix-diff", ...
mirror = True  # False where a mirrored image is another one
model = None  # None: chosen by the kind of images; "open_clip:ViT-B-16/laion2b_s34b_b88k", "timm:NAME", ...
weights = None  # a file for the encoder
image_size = None
batch_size = None
epochs = None
learning_rate = None  # None: found on the public images in FOLDER/synthetic/CLASS, else the recommended one
physical_batch = None

# %% tags=["hide-input"]

import shutil

import pandas as pd
from IPython.display import Image, Markdown, display

import dpmix
from dpmix.companion import examples
from dpmix.core import files
from dpmix.core.checks import counted
from dpmix.images import data
from dpmix.own.report import card_text

practice, own = folder is None, data.PROJECT / "data" / "own"  # then all that is made here is removed at the end
if practice:
    shutil.rmtree(own, ignore_errors=not own.exists())
    folder, mirror = examples.digits_folder(own / "photos"), False
asked = dict(
    out=out, delta=delta, method=method, model=model, weights=weights, image_size=image_size, batch_size=batch_size
)
asked |= dict(epochs=epochs, learning_rate=learning_rate, physical_batch=physical_batch)
settings = {name: value for name, value in asked.items() if value is not None} | dict(
    mirror=mirror, progress=not practice
)

# %% [markdown]
# ## Check
#
# Before any budget is spent: what is in the folder, what the run would be and why, how long it takes, and what it may be worth. Nothing is trained and no noise is drawn.

# %%
checked = dpmix.check(folder, eps, **settings)
checked

# %% [markdown]
# ## Train once
#
# One call, one release. The learning rate was found without a look at the private images: on public ones where the folder has some, else the rate that did best on
# public data sets. A call that was interrupted goes on when it is made again.

# %%
trained = dpmix.train(folder, eps, **settings)
trained

# %% mystnb={"image": {"alt": "Confusion matrix of the test images: a row a true class, a column what the model says, in percent"}}
display(Image(filename=trained.private / "confusion.png"))

# %% [markdown]
# *What the model says of the test images of each class, in percent of the class.* That is a statistic of the *test* images; publish it if their owners agree. A run
# with fresh entropy gives one number, another run another, and a second run on the same images would be a second release.
#
# ## The release
#
# The folder holds the weights, the privacy card, the names of the classes and a short README. Neither the seed nor any accuracy is in it.

# %%
Markdown(card_text(dpmix.runs.predict.read_card(trained.release)))

# %% [markdown]
# ## Use it, as anybody may
#
# Whoever has the folder can classify, in one line. The encoder is public: it is found by its name, and its sha256 is compared with the card's. Images are brought to size exactly
# as in training.

# %%
tests = checked.plan.listing.files[checked.plan.listing.train :]
shown = tests[:: max(1, len(tests) // 12)]
found = dpmix.predict(trained.release, shown)
found.class_names

# %% tags=["hide-input"] mystnb={"image": {"alt": "A row of test images, each with its true class and the class that the release gives to it"}}
examples.predicted(found, [f.parent.name for f in shown])

# %% [markdown]
# *Some test images: what the release says, with its probability, and the true class.*

# %% tags=["hide-input"]
if practice:
    shutil.rmtree(own)

# %% [markdown]
# ## A real example: malaria cells
#
# Images of red blood cells, parasitised or not, from blood films of some 150 people (NIH; Rajaraman et al. 2018), trained by the same call (`benchmarks/malaria.py`). It was
# made once and came with the repository. Two things are to be learned from it.
#
# **Split by person.** The split in which these images are often handed round has the same patients on both sides; a test on it asks whether the model knows its own patients again.
# Here every fifth patient, and nobody of them in training, is the test. Images whose names do not tell the patient were left out.
#
# **ε is that of one image.** A patient with a hundred images is in a group of a hundred: for the group the guarantee is a hundred times ε, which promises nothing. Where people are to be
# protected, keep one image of each, or choose ε so small that its multiple still means something; then read the accuracy again.

# %% tags=["hide-input"]
kept = files.read_json(data.RESULTS / "malaria" / "runs.json")
parts, about = kept["data"], kept["provenance"]
usual = parts["train"]["images_of_a_patient"][1]
table = (
    pd.DataFrame(
        {
            "ε of an image": r["epsilon"],
            f"ε of a patient with {counted(round(usual), 'image')}": r["epsilon"] * usual,
            "right (%)": round(100 * r["report"]["accuracy"], 1),
            "95 % interval": "{:.1f} to {:.1f}".format(*(100 * x for x in r["report"]["interval_95"])),
            **{f"of {c}": round(100 * v["accuracy"], 1) for c, v in r["report"]["by_class"].items()},
        }
        for r in kept["runs"]
    )
    .set_index("ε of an image")
    .sort_index()
)
display(table)
Markdown(
    f"{counted(parts['train']['images'], 'image')} of {counted(parts['train']['patients'], 'patient')} for training, {counted(parts['test']['images'], 'image')} of {counted(parts['test']['patients'], 'other')} for "
    f"testing; {kept['left_out']:,} left out. {kept['runs'][0]['card']['encoder']['name']} at {kept['runs'][0]['card']['encoder']['image_size']} pixels, "
    f"one run at each ε, {about['date'][:10]}, {about['device']}, commit {about['commit'][:9]}{' with changes' if about['dirty'] else ''}. The interval counts "
    "images as if they were independent; those of one patient are not, so it is too narrow."
)

# %% [markdown]
# ## Run it on yours
#
# ```console
# $ python -m dpmix check photos --epsilon 2
# $ python -m dpmix train photos --epsilon 2 --out release
# $ python -m dpmix predict release new/photo.jpg
# $ papermill notebooks/own_images.ipynb out.ipynb -p folder photos -p eps 2.0        # the same as a page, private
# ```
#
# What is private lies in `private/` beside the release, readable by you alone: seeds, decoded images, the log and the report. Keep it where the images are, or
# delete it.
