"""Execute the notebooks of the book, two at a time, into the cache from which `jupyter-book build` takes their outputs.

A line a page says its name, its seconds and how many are left. What is in the cache is not executed again. A page that
fails is left to `jupyter-book`, which reports it with its traceback.
"""

import argparse
import os
import time
from pathlib import Path

import nbformat
import yaml
from joblib import Parallel, delayed
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution

BOOK = Path(__file__).resolve().parent


def pages() -> list[Path]:
    """The notebooks of the table of contents, in its order."""
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text())
    files = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    return [path for file in files if (path := BOOK / f"{file}.ipynb").is_file()]


def execute(path: Path) -> tuple[Path, nbformat.NotebookNode, float, str]:
    """One page, executed in its folder: path, notebook with outputs, seconds, what went wrong ("" if nothing)."""
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    result = single_nb_execution(notebook, cwd=str(path.parent), timeout=-1, allow_errors=False, meta_override=True)
    return path, notebook, time.monotonic() - started, "" if result.err is None else type(result.err).__name__


def missing(found: list[Path], cache) -> list[Path]:
    """The pages whose outputs the cache does not have."""
    lacks = []
    for path in found:
        try:
            cache.match_cache_notebook(nbformat.read(path, as_version=4))
        except KeyError:
            lacks.append(path)
    return lacks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-a-time", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    at_a_time = parser.parse_args().at_a_time
    cache = get_cache(BOOK / "_build" / ".jupyter_cache")
    todo = missing(pages(), cache)
    done = Parallel(n_jobs=at_a_time, return_as="generator_unordered")(delayed(execute)(path) for path in todo)
    for left, (path, notebook, seconds, error) in zip(range(len(todo) - 1, -1, -1), done, strict=True):
        print(f"{path.stem}: {f'failed ({error})' if error else 'done'} in {seconds:.0f} s, {left} left", flush=True)
        if not error:
            bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


if __name__ == "__main__":
    main()
