import pytest

from reelflow.cli.main import run
from tiny_model import tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A run folder with a tiny model of random weights: 9 frames of 32 x 32 at 8 fps."""
    folder = tmp_path_factory.mktemp("run")
    tiny_pipeline().save(folder / "model")
    return folder


@pytest.fixture
def reelflow(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder; returns (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return command
