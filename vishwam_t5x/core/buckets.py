"""What a file system cannot tell of a bucket: that it exists, may be written, and lies near.

`check_bucket` is for `vishwam doctor` and for launchers, before anything is started. It asks
Google's own client, which is handed in by tests.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.request
from typing import Any

from vishwam_t5x.core.errors import UserError

NEEDED = ("storage.objects.create", "storage.objects.delete", "storage.objects.get",
          "storage.objects.list")
"""Permissions of a run on the bucket of its MODEL_DIR or cache; roles/storage.objectUser has
them."""

_ZONE = "http://metadata.google.internal/computeMetadata/v1/instance/zone"
# Multi-regions by the regions they are made of.
_CONTINENTS = {"US": r"(us|northamerica)-", "EU": "europe-", "ASIA": "asia-"}
# Dual-regions that have a name of their own; others list their regions.
_PAIRS = {"NAM4": ("us-central1", "us-east1"), "EUR4": ("europe-north1", "europe-west4"),
          "EUR5": ("europe-west1", "europe-west2"), "EUR7": ("europe-west2", "europe-west3"),
          "EUR8": ("europe-west3", "europe-west6"), "ASIA1": ("asia-northeast1", "asia-northeast2")}


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """What was found; `raise_first` makes an error of it.

    Attributes:
        bucket: its name, without gs://.
        location: e.g. 'US-CENTRAL2', or 'US'; None if it does not exist or cannot be asked.
        problems: what prevents a run: (what is wrong, what to do), the worst first.
        advice: what only makes it slow or dear.
    """

    bucket: str
    location: str | None
    problems: tuple[tuple[str, str], ...] = ()
    advice: tuple[tuple[str, str], ...] = ()

    def raise_first(self) -> None:
        """Raises the first problem.

        Raises:
            UserError: there is one.
        """
        for what, fix in self.problems:
            raise UserError(what, got=f"gs://{self.bucket}", fix=fix)


def bucket_of(path: str) -> str:
    """Returns the name of the bucket of a gs:// path.

    Raises:
        UserError: it is no gs:// path.
    """
    found = re.match(r"gs://([^/]+)", path)
    if found is None:
        raise UserError("this is not in a bucket of Google Cloud Storage", got=path,
                        fix="gs://BUCKET/FOLDER")
    return found[1]


def region_of(zone_or_region: str) -> str:
    """Returns 'us-central2' of 'us-central2-b', 'projects/1/zones/us-central2-b' or itself."""
    name = zone_or_region.strip().rsplit("/", 1)[-1].lower()
    return re.sub(r"-[a-z]$", "", name)


def own_region(timeout: float = 1.0) -> str | None:
    """Returns the region of this machine in Google Cloud; None elsewhere.

    Args:
        timeout: seconds to wait for the machine's metadata.
    """
    request = urllib.request.Request(_ZONE, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return region_of(answer.read().decode())
    except (OSError, ValueError):
        return None


def check_bucket(path: str, region: str | None = None, client: Any = None) -> BucketReport:
    """Asks whether a run can live in the bucket of a path.

    Args:
        path: gs://BUCKET/…
        region: of the accelerator, or its zone; None: the location is not judged.
        client: `google.cloud.storage.Client`, or what stands for it; None: one with the
            credentials of the environment.

    Raises:
        UserError: no gs:// path, no client library, or no credentials.
    """
    name = bucket_of(path)
    client = client or make_client()
    try:
        bucket = client.get_bucket(name, timeout=30)
    except Exception as error:  # noqa: BLE001 - told apart below, and anything else is told too
        return BucketReport(name, None, (_no_bucket(name, region, error),))
    problems, advice = [], []
    try:
        allowed = set(bucket.test_iam_permissions(list(NEEDED), timeout=30))
    except Exception as error:  # noqa: BLE001 - not being allowed to ask proves nothing
        allowed = set(NEEDED)
        advice.append((f"what may be done in it could not be asked ({type(error).__name__})",
                       "the first write will tell"))
    if lacking := [permission for permission in NEEDED if permission not in allowed]:
        problems.append((f"the bucket may not be used by this account: {', '.join(lacking)} is "
                         "missing",
                         f"gcloud storage buckets add-iam-policy-binding gs://{name} "
                         "--member=ACCOUNT --role=roles/storage.objectUser"))
    if region and not is_near(bucket.location, region_of(region), _regions(bucket)):
        problems.append((
            f"the bucket lies in {bucket.location}, the accelerator in {region_of(region)}: every "
            "checkpoint would cross regions, slowly and for money",
            f"gcloud storage buckets create gs://NAME --location={region_of(region)}"))
    return BucketReport(name, bucket.location, tuple(problems), tuple(advice))


def is_near(location: str, region: str, regions: tuple[str, ...] = ()) -> bool:
    """Whether data in a bucket's location is in a region, or in a multi-region around it.

    Args:
        location: 'US-CENTRAL2', 'NAM4', 'US', in any case.
        region: e.g. 'us-central2'.
        regions: those of a dual-region, where the bucket names them.
    """
    location, region = location.upper(), region.lower()
    if location in _CONTINENTS:
        return re.match(_CONTINENTS[location], region) is not None
    near = {name.lower() for name in regions} | set(_PAIRS.get(location, ()))
    return region in (near or {location.lower()})


def _regions(bucket: Any) -> tuple[str, ...]:
    found = getattr(bucket, "data_locations", None)
    return tuple(found) if isinstance(found, list | tuple) else ()


def _no_bucket(name: str, region: str | None, error: Exception) -> tuple[str, str]:
    code = getattr(error, "code", None)
    if code == 404:
        place = region_of(region) if region else "REGION"
        return ("there is no such bucket",
                f"gcloud storage buckets create gs://{name} --location={place}")
    if code in (401, 403):
        return ("the bucket may not be looked at by this account",
                f"gcloud storage buckets add-iam-policy-binding gs://{name} --member=ACCOUNT "
                "--role=roles/storage.admin, or whoever owns it does")
    return (f"the bucket could not be asked: {type(error).__name__}: {str(error)[:200]}",
            "look at the network and at `gcloud auth list`")


def make_client() -> Any:
    """Returns a `google.cloud.storage.Client`, of the emulator where the environment names one.

    Raises:
        UserError: the library or credentials are missing.
    """
    try:
        from google.auth import credentials, exceptions
        from google.cloud import storage
    except ImportError as error:
        raise UserError("gs:// needs google-cloud-storage", got=error,
                        fix="pip install 'vishwam_t5x[gcs]'") from error
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client(project="emulator", credentials=credentials.AnonymousCredentials())
    try:
        return storage.Client()
    except (exceptions.GoogleAuthError, OSError) as error:
        raise UserError("there are no credentials for Google Cloud", got=error,
                        fix="gcloud auth application-default login") from error
