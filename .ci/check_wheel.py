"""Called by .ci/run in the clean environment: is the package that was installed whole?"""

import pathlib
import sys

import bayesmeta
import bayesmeta.models


def main(environment: str, root: str) -> None:
    """Compare the installed package with the repository, file by file.

    Args:
        environment: Folder of the environment into which the wheel was installed.
        root: Folder of the repository.
    """
    installed, source = pathlib.Path(bayesmeta.__file__).resolve().parent, pathlib.Path(root) / "bayesmeta"
    if not installed.is_relative_to(pathlib.Path(environment).resolve()):
        sys.exit(f"imported {installed}, expected the wheel in {environment}")
    want = {
        path.relative_to(folder.parent if folder.name == "models" else folder)
        for folder in (source, pathlib.Path(root) / "models")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = sorted(str(path) for path in want if not (installed / path).is_file())
    if missing:
        sys.exit(f"the wheel lacks {', '.join(missing)}")
    sys.stdout.write(f"bayesmeta {bayesmeta.__version__} from the wheel: {len(want)} files, as in the repository\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
