# Notebooks as jobs, on one machine or on a cluster: book/paper_scale.md shows how. A pass (one encoder, one seed, ...) is the
# notebook itself with parameters that leave one pass to compute; its results go to the store. The whole notebook then reads them.
#
#   snakemake --cores 2                                        # every table and figure at demo scale
#   snakemake --cores 2 --config 'tables=[table3]' eps=1 'seeds=[0,1]'
#   snakemake --cores 2 --config scale=laptop 'tables=[table3]' 'datasets=[eurosat]'
#   snakemake --executor slurm --jobs 20 --config scale=paper 'datasets=[eurosat]'
#
# --config takes scale, tables, datasets, device (cpu, cuda) and every parameter of a notebook; a notebook that lacks it is not given it.
import ast
import hashlib
import json
import re
import sys
from itertools import product
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

from dpmix.companion import paper

# What the passes of a notebook differ in, and how many of them a job still holds that a CPU can compute side by side.
# A notebook with none computes what it shows itself.
PASSES = {
    "table1": (["seeds"], 6),
    "table2": (["methods", "eps", "seeds"], 1),
    "table3": (["models", "seeds"], 1),
    "table4": (["seeds"], 1),
    "table5": ([], 6),  # networks and heads have seeds of their own
    "table6": (["models", "seeds"], 3),
    "table7": (["encoders"], 1),
    "table8": (["encoders"], 1),
    "table9": (["seeds"], 1),
    "table10": (["models", "seeds"], 2),
    "table11": (["models", "seeds"], 1),
    "table12": (["seeds"], 3),
    "table13": ([], 1),
    "figure1": ([], 1),
    "figure2": (["seeds"], 1),
}
# What a parameter that is None stands for: dpmix.companion.grids has the same (tests/book/test_snakefile.py), but takes long to import.
DEFAULTS = {
    "demo": {"seeds": list(range(10)), "models": ["tiny-vit", "tiny-convnext"], "eps": [2, 8]},
    "laptop": {"seeds": list(range(5)), "models": ["efficientnet-lite0"], "eps": [8]},
    "paper": {"seeds": [0, 1, 2], "models": list(paper.SETTINGS["fine-tuning"].models), "eps": list(paper.EPSILONS)},
}
SEEDS = {"table1": 3, "table2": 3, "table9": 5, "table11": 3, "figure2": 5}  # of the demo, where they are fewer; networks: 3 at any scale
ENCODERS = {
    **{scale: {t: DEFAULTS[scale]["models"] for t in ("table7", "table8")} for scale in ("demo", "laptop")},
    "paper": {"table7": ["inceptionv3"], "table8": ["inceptionv3", "vit-b-16"]},
}
LAPTOP = ["cifar10", "cifar100", "eurosat", "caltech101"]
ROOT = Path(workflow.basedir)


def plain(value):
    """--config leaves the items of a list as text."""
    return [plain(v) for v in value] if isinstance(value, list) else yaml.safe_load(value) if isinstance(value, str) else value


def many(value):
    return value if isinstance(value, list) else [value]


def one_of(name, values, allowed):
    for value in values:
        if value not in allowed:
            raise WorkflowError(f"--config {name}={value}: must be one of {', '.join(allowed)}")
    return values


def parameters(name):
    """What the parameters cell of a notebook sets."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse("".join(cell["source"])).body}


CONFIG = {name: plain(value) for name, value in config.items()}
(SCALE,) = one_of("scale", [CONFIG.get("scale", "demo")], list(DEFAULTS))
TABLES = one_of("tables", many(CONFIG.get("tables", list(PASSES))), list(PASSES))
PARAMETERS = {name: parameters(name) for name in TABLES}
(DEVICE,) = one_of("device", [CONFIG.get("device", "cuda" if SCALE == "paper" else "cpu")], ["cpu", "cuda"])
ASKED = {k: v for k, v in CONFIG.items() if k not in ("scale", "tables", "datasets", "device")}
KNOWN = sorted({p for have in PARAMETERS.values() for p in have} - {"dataset", "scale"})
for unknown in ASKED.keys() - set(KNOWN):
    raise WorkflowError(f"--config {unknown}: must be scale, tables, datasets, device, or a parameter of these notebooks: {', '.join(KNOWN)}")


def datasets(name):
    """The data sets of a table: the demo's, or those for which the paper has numbers, less what --config leaves out."""
    if SCALE == "demo":
        known = ["digits"]
    elif SCALE == "laptop":
        known = LAPTOP if name in ("table3", "table10") else LAPTOP[:1]
    elif name.startswith("table"):
        known = list(dict.fromkeys(paper.table(int(name.removeprefix("table")))["dataset"]))
    else:
        known = {"figure1": ["cifar10"], "figure2": ["cifar10", "caltech256"]}[name]
    return [d for d in known if d in many(CONFIG.get("datasets", known))]


one_of("datasets", many(CONFIG.get("datasets", [])), sorted({d for name in TABLES for d in {"demo": ["digits"], "laptop": LAPTOP}.get(SCALE, paper.DATASETS)}))


def asked(name, dataset):
    """The parameters of the whole notebook."""
    given = {**ASKED, "scale": SCALE, "dataset": dataset}
    return {k: v for k, v in given.items() if k in PARAMETERS[name]}


def parts(name):
    """The passes of a notebook: a word for the file name, and the parameters that single it out."""
    given = {**DEFAULTS[SCALE], "encoders": ENCODERS[SCALE].get(name)}
    if name in SEEDS and (SCALE == "demo" or name in ("table1", "table2")):
        given["seeds"] = given["seeds"][: SEEDS[name]]
    if SCALE == "demo" and name in ("table6", "table10"):
        given["models"] = ["tiny-convnext"]
    values = [many(ASKED.get(axis) or PARAMETERS[name][axis] or given[axis]) for axis in PASSES[name][0]]
    single = [dict(zip(PASSES[name][0], v)) for v in product(*values)] if values else []
    return {re.sub(r"[^\w.-]", "_", ".".join(f"{k}-{v}" for k, v in s.items())): {k: [v] for k, v in s.items()} for s in single}


def small(name):
    """Whether the notebook only reads what the passes have computed. The gradients of figure2 are not stored: it makes them again."""
    return (bool(PASSES[name][0]) and name != "figure2") or name == "figure1"


PARTS = {name: parts(name) for name in TABLES}
OUT = f"data/executed/{SCALE}"
CODE = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((ROOT / "dpmix").rglob("*.py")))).hexdigest()[:12]
GPU = int(DEVICE == "cuda")
# A job on the CPU does not see a GPU. What a cell says while it runs goes to the log.
RUN = (
    ("" if GPU else "CUDA_VISIBLE_DEVICES= ")
    + f"{sys.executable} -m papermill --no-progress-bar --log-output {{input.notebook}} {{output}} -y {{params.asked:q}} 2> {{log}}"
)


wildcard_constraints:
    name="|".join(TABLES),
    dataset=r"\w+",


localrules:
    all,


rule all:
    input:
        [f"{OUT}/{dataset}/{name}.ipynb" for name in TABLES for dataset in datasets(name)],


rule one_pass:
    input:
        notebook=f"{ROOT}/notebooks/{{name}}.ipynb",
    output:
        f"{OUT}/{{dataset}}/passes/{{name}}/{{part}}.ipynb",
    log:
        f"{OUT}/{{dataset}}/passes/{{name}}/{{part}}.log",
    params:
        code=CODE,  # other code, other results: the job is done again
        asked=lambda w: json.dumps({**asked(w.name, w.dataset), **PARTS[w.name][w.part]}),
    threads: lambda w: 4 if GPU else PASSES[w.name][1]
    resources:
        mem_mb={"paper": 48_000, "laptop": 12_000, "demo": 4_000}[SCALE],
        runtime=60 if SCALE == "demo" else 1440,
        gpu=GPU,
    shell:
        RUN


rule notebook:
    input:
        notebook=f"{ROOT}/notebooks/{{name}}.ipynb",
        passes=lambda w: [f"{OUT}/{w.dataset}/passes/{w.name}/{part}.ipynb" for part in PARTS[w.name]],
    output:
        f"{OUT}/{{dataset}}/{{name}}.ipynb",
    log:
        f"{OUT}/{{dataset}}/{{name}}.log",
    params:
        code=CODE,  # other code, other results: the job is done again
        asked=lambda w: json.dumps(asked(w.name, w.dataset)),
    threads: lambda w: 1 if small(w.name) else 4
    resources:
        mem_mb=lambda w: 48_000 if SCALE == "paper" else 4_000,
        runtime=lambda w: (240 if small(w.name) else 1440) if SCALE == "paper" else 60,
        gpu=lambda w: 0 if small(w.name) else GPU,
    shell:
        RUN
