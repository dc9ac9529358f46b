"""One cluster for all tests of this folder."""

import pytest

from tests.cluster.images import apptainer, checkout, image, person, rootfs, sif
from tests.cluster.site import site as open_site
from tests.cluster.slurm import NODES, slurm

__all__ = ["apptainer", "checkout", "image", "person", "rootfs", "sif"]

HOSTS = ("a100-0", "a100-1")


@pytest.fixture(scope="package")
def cluster():
    """A node of each kind of GPU and a second A100, up for as long as tests of this folder run."""
    with slurm(NODES) as found:
        yield found


@pytest.fixture(scope="package")
def site(cluster):
    """The same with a shared filesystem and ordinary users."""
    with open_site(cluster) as found:
        yield found
