"""What is said of a bucket, by a client that stands for Google's."""

from __future__ import annotations

import pytest

from vishwam_t5x import doctor
from vishwam_t5x.core import buckets
from vishwam_t5x.core.errors import UserError


class Refusal(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.code = code


class Client:
    """One bucket, 'there', with a location and permissions."""

    def __init__(self, location="US-CENTRAL2", allowed=buckets.NEEDED, regions=None, code=None):
        self.location, self.allowed, self.data_locations = location, allowed, regions
        self.code = code

    def get_bucket(self, name, timeout):
        if self.code or name != "there":
            raise Refusal(self.code or 404)
        return self

    def test_iam_permissions(self, wanted, timeout):
        return [permission for permission in wanted if permission in self.allowed]


def check(path="gs://there/run", region="us-central2-b", **settings):
    return buckets.check_bucket(path, region, Client(**settings))


def test_a_good_bucket():
    report = check()
    assert report.problems == report.advice == () and report.location == "US-CENTRAL2"
    report.raise_first()


@pytest.mark.parametrize(("settings", "problem", "fix"), [
    ({"path": "gs://away/run"}, "no such bucket", "create gs://away --location=us-central2"),
    ({"code": 403}, "may not be looked at", "storage.admin"),
    ({"code": 500}, "could not be asked: Refusal: HTTP 500", "network"),
    ({"allowed": ("storage.objects.get", "storage.objects.list")},
     "storage.objects.create, storage.objects.delete is missing", "storage.objectUser"),
    ({"location": "EUROPE-WEST4"}, "lies in EUROPE-WEST4, the accelerator in us-central2",
     "--location=us-central2"),
    ({"location": "EU"}, "lies in EU", "--location")])
def test_problems(settings, problem, fix):
    report = check(**settings)
    assert [problem in what and fix in how for what, how in report.problems] == [True]
    with pytest.raises(UserError, match="fix:"):
        report.raise_first()


@pytest.mark.parametrize(("location", "regions", "region", "near"), [
    ("us", (), "us-east1", True), ("US", (), "northamerica-northeast1", True),
    ("ASIA", (), "us-east1", False), ("NAM4", (), "us-central1", True),
    ("NAM4", (), "us-west1", False), ("EU", ("EUROPE-WEST1",), "europe-west4", True),
    ("CUSTOM", ("US-EAST1", "US-WEST1"), "us-west1", True),
    ("CUSTOM", ("US-EAST1", "US-WEST1"), "us-west4", False), ("us-west4", (), "us-west4", True)])
def test_near(location, regions, region, near):
    assert buckets.is_near(location, region, regions) is near


def test_not_a_bucket():
    with pytest.raises(UserError, match="not in a bucket"):
        buckets.check_bucket("/tmp/x", None, Client())


@pytest.mark.parametrize(("given", "region"), [
    ("us-central2-b", "us-central2"), ("projects/12/zones/europe-west4-a", "europe-west4"),
    ("us-east1", "us-east1")])
def test_region_of(given, region):
    assert buckets.region_of(given) == region


def test_doctor_says_it():
    found, = doctor.look_at_bucket("bucket", "gs://there/run", "us-central2", Client())
    assert found.status == doctor.OK and "accelerator in us-central2" in found.value
    found, = doctor.look_at_bucket("bucket", "gs://there", "us-east1", Client())
    assert found.status == doctor.PROBLEM and "--location=us-east1" in found.fix
