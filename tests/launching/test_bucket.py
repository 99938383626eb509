"""The look at a bucket, with a client that plays Google's."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.launching import bucket

EVERYTHING = ("storage.objects.create", "storage.objects.delete", "storage.objects.get",
              "storage.objects.list")


@dataclasses.dataclass
class Bucket:
    """One bucket as the library shows it."""

    location: str = "US-CENTRAL2"
    granted: tuple[str, ...] = EVERYTHING
    data_locations: tuple[str, ...] | None = None

    def test_iam_permissions(self, permissions):
        return [permission for permission in permissions if permission in self.granted]


class Client:
    """A client that knows some buckets and refuses one."""

    def __init__(self, **buckets: Bucket) -> None:
        self.buckets = buckets

    def lookup_bucket(self, name):
        if name == "secret":
            raise PermissionError("403 GET: no access\nlong text")
        return self.buckets.get(name)


def test_a_good_bucket_is_said_to_be_good():
    client = Client(mine=Bucket())
    assert "may be written" in bucket.check("gs://mine/run", "us-central2", client)


@pytest.mark.parametrize("found", [
    Bucket("US"), Bucket("us-central2"), Bucket("NAM4", data_locations=("US-CENTRAL1",
                                                                        "US-CENTRAL2"))])
def test_regions_that_are_near(found):
    bucket.check("gs://mine", "us-central2", Client(mine=found))


@pytest.mark.parametrize("found", [
    Bucket("EU"), Bucket("US-EAST1"), Bucket("NAM4", data_locations=("US-EAST1", "US-EAST4"))])
def test_a_bucket_elsewhere_is_refused(found):
    with pytest.raises(UserError, match="not in the accelerator's region") as caught:
        bucket.check("gs://mine", "us-central2", Client(mine=found))
    assert "--location=us-central2" in caught.value.fix
    bucket.check("gs://mine", None, Client(mine=found))  # Where the region is not known.


def test_a_bucket_that_is_not_there():
    with pytest.raises(UserError, match="no such bucket") as caught:
        bucket.check("gs://mine/run", "us-central2", Client())
    assert "buckets create gs://mine --location=us-central2" in caught.value.fix


def test_a_bucket_that_may_not_be_written():
    with pytest.raises(UserError, match="may not be written") as caught:
        bucket.check("gs://mine", None, Client(mine=Bucket(granted=EVERYTHING[2:])))
    assert "storage.objects.create" in caught.value.got
    assert "storage.objects.get" not in caught.value.got


def test_a_bucket_that_may_not_be_looked_at():
    with pytest.raises(UserError, match="cannot be looked at") as caught:
        bucket.check("gs://secret", None, Client())
    assert "long text" not in str(caught.value)


@pytest.mark.parametrize("url", ["gs://", "s3://x", "runs/x"])
def test_what_is_no_bucket(url):
    with pytest.raises(UserError, match="not the address"):
        bucket.check(url, None, Client())


def test_without_the_library_or_without_a_login(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", _missing)
    assert bucket.default_client() is None

    class Library:
        def Client(self, project):
            raise RuntimeError("no default credentials")

    monkeypatch.setattr(importlib, "import_module", lambda name: Library())
    with pytest.raises(UserError, match="cannot be looked at") as caught:
        bucket.default_client("p")
    assert "login" in caught.value.fix


def _missing(name):
    raise ImportError(name)


def test_the_region_of_a_zone():
    assert bucket.region_of("europe-west4-a") == "europe-west4"
