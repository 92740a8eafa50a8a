"""The workflow: which jobs it plans at each scale, what it refuses, and that the notebooks find what its passes computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dpmix.companion import grids, networks, paper

ROOT = Path(__file__).resolve().parents[2]


def snakemake(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(folder),
        *options,
    ]
    environment = {**os.environ, "DPMIX_STORE": str(folder / "store"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def planned(folder: Path, *config: str) -> dict[str, dict]:
    """The outputs that a dry run would make, with the parameters that their notebooks would be given and the GPUs asked for."""
    done = snakemake(folder, "--dry-run", "--printshellcmds", "--config", *config)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    jobs = {}
    for block in (done.stdout + done.stderr).split("\n\n"):
        output = [line.split()[-1] for line in block.splitlines() if line.strip().startswith("output: ")]
        given = [line.split(" -y '")[1].split("' 2>")[0] for line in block.splitlines() if " -m papermill " in line]
        if output and given:
            jobs[output[0].removeprefix("data/executed/")] = json.loads(given[0]) | {"gpu": "gpu=1" in block}
    return jobs


def test_the_demo_has_a_job_for_each_pass_and_one_for_the_notebook(tmp_path):
    jobs = planned(tmp_path, "tables=[table3]", "eps=1")
    p = grids.preset("demo")
    parts = {f"demo/digits/passes/table3/models-{m}.seeds-{s}.ipynb": (m, s) for m in p.models for s in p.seeds}
    assert set(jobs) == {*parts, "demo/digits/table3.ipynb"}
    for path, (model, seed) in parts.items():
        assert jobs[path] == {
            "eps": 1,
            "scale": "demo",
            "dataset": "digits",
            "models": [model],
            "seeds": [seed],
            "gpu": False,
        }
    assert jobs["demo/digits/table3.ipynb"] == {"eps": 1, "scale": "demo", "dataset": "digits", "gpu": False}


@pytest.mark.parametrize("scale", grids.SCALES)
def test_the_passes_of_networks_cover_the_budgets_and_seeds_of_the_scale(tmp_path, scale):
    jobs = planned(tmp_path, f"scale={scale}", "tables=[table2]")
    dataset = "digits" if scale == "demo" else "cifar10"
    passes = [job for path, job in jobs.items() if f"{dataset}/passes/" in path]
    p = networks.network_preset(scale, dataset)
    assert {(j["eps"][0], j["seeds"][0]) for j in passes} == {(e, s) for e in p.epsilons for s in p.seeds}
    assert {j["methods"][0] for j in passes} == {"self-aug", "mix-self"}


def test_the_paper_has_a_notebook_for_each_table_and_data_set_and_gpus_for_passes_only(tmp_path):
    jobs = planned(tmp_path, "scale=paper")
    whole = {path.removesuffix(".ipynb") for path in jobs if "/passes/" not in path}
    assert whole >= {f"paper/{d}/table{n}" for n in range(1, 14) for d in set(paper.table(n)["dataset"])}
    assert all(job["gpu"] for path, job in jobs.items() if "/passes/" in path)
    assert not jobs["paper/cifar10/table3.ipynb"]["gpu"]
    assert jobs["paper/caltech256/table13.ipynb"]["gpu"]  # it times a pass: it computes
    assert jobs["paper/caltech256/figure2.ipynb"]["gpu"]  # gradients are not kept
    seen = {tuple(j["models"]) for path, j in jobs.items() if "/passes/table3/" in path}
    assert seen == {(m,) for m in grids.preset("paper").models}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("tables=[table33]", "tables=table33: must be one of table1"),
        ("datasets=[digts]", "datasets=digts: must be one of digits"),
        ("scale=big", "scale=big: must be one of demo, laptop, paper"),
        ("device=gpu", "device=gpu: must be one of cpu, cuda"),
        ("batchsize=3", "batchsize: must be scale, tables, datasets, device, or a parameter of these notebooks"),
    ],
)
def test_what_no_notebook_understands_is_refused_before_any_work(tmp_path, config, said):
    done = snakemake(tmp_path, "--dry-run", "--config", config)
    assert done.returncode != 0 and said in done.stdout + done.stderr


def test_passes_run_and_the_notebook_computes_nothing_anew(tmp_path):
    tiny = ["tables=[table3]", "eps=1", "models=[tiny-convnext]", "seeds=[0,1]", "epochs=0.3", "learning_rates=[4,8]"]
    done = snakemake(tmp_path, "--cores", "2", "--config", *tiny)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    out = tmp_path / "data" / "executed" / "demo" / "digits"
    shown = str(
        [
            o.get("data", {})
            for c in nbformat.read(out / "table3.ipynb", as_version=4).cells
            for o in c.get("outputs", [])
        ]
    )
    assert "Made now" in shown and "image/png" in shown
    results = sorted((tmp_path / "store").glob("*.json"))
    assert len(results) == 7 * 2 * 2
    passes = sorted((out / "passes" / "table3").glob("*.ipynb"))
    assert [p.stem for p in passes] == [f"models-tiny-convnext.seeds-{s}" for s in (0, 1)]
    # The last notebook began when both passes were written, and no result is younger.
    assert max(r.stat().st_mtime for r in results) <= max(p.stat().st_mtime for p in passes)
    again = snakemake(tmp_path, "--dry-run", "--config", *tiny)
    assert "Nothing to be done" in again.stdout + again.stderr
    other = snakemake(tmp_path, "--dry-run", "--config", *[t.replace("eps=1", "eps=2") for t in tiny])
    assert "Nothing to be done" not in other.stdout + other.stderr
