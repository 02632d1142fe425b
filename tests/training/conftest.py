"""What the tests of training share."""

import pytest
from small_runs import write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder / "train", 12)
    write_records(folder / "val", 4, seed=0)
    return folder
