"""Looks, before anything is started and paid for, whether a bucket will do."""

from __future__ import annotations

import importlib
from typing import Any

from vishwam_t5x.core.errors import UserError

_NEEDED = ("storage.objects.create", "storage.objects.delete", "storage.objects.get",
           "storage.objects.list")
# Continents of the buckets that span several regions; the predefined pairs are told by the API.
_CONTINENTS = {"US": ("us-", "northamerica-"), "EU": ("europe-",), "ASIA": ("asia-",)}


def region_of(zone: str) -> str:
    """Returns the region of a zone: 'us-central2' for 'us-central2-b'."""
    return zone.rpartition("-")[0]


def default_client(project: str | None = None) -> Any | None:
    """Returns a client of Google Cloud Storage, or None where the library is not installed.

    Who we are is the library's business: nothing of it is looked at here.

    Raises:
        UserError: the library does not know who we are.
    """
    try:
        storage = importlib.import_module("google.cloud.storage")
    except ImportError:
        return None
    try:
        return storage.Client(project=project)
    except Exception as error:  # Of google.auth's many; all mean the same to a user.
        raise UserError("buckets cannot be looked at", got=_first_line(error),
                        fix="gcloud auth application-default login") from error


def check(url: str, region: str | None, client: Any) -> str:
    """Checks that the bucket of `url` exists, may be written, and lies in `region`.

    Args:
        url: 'gs://BUCKET/FOLDER'.
        region: region of the accelerator; None: not known, not compared.
        client: a `google.cloud.storage.Client`, or what behaves like one.

    Returns:
        One line that says what was found.

    Raises:
        UserError: it does not exist, may not be looked at or written, or lies elsewhere.
    """
    name = url.removeprefix("gs://").partition("/")[0]
    if not name or not url.startswith("gs://"):
        raise UserError("not the address of a bucket", got=url, fix="gs://BUCKET/FOLDER")
    try:
        found = client.lookup_bucket(name)
    except Exception as error:  # Of the library's many; all mean the same to a user.
        raise UserError(f"the bucket {name} cannot be looked at", got=_first_line(error),
                        fix="gcloud auth application-default login, and a role on the bucket, e.g. "
                            "Storage Object Admin and Storage Legacy Bucket Reader") from error
    if found is None:
        where = f" --location={region}" if region else ""
        raise UserError("there is no such bucket", got=name,
                        fix=f"gcloud storage buckets create gs://{name}{where}")
    try:
        granted = set(found.test_iam_permissions(list(_NEEDED)))
    except Exception as error:
        raise UserError(f"whether {name} may be written cannot be found out",
                        got=_first_line(error)) from error
    if lacking := [permission for permission in _NEEDED if permission not in granted]:
        raise UserError(f"the bucket {name} may not be written",
                        got=f"without {', '.join(lacking)}",
                        fix="ask its owner for the role Storage Object Admin")
    location = str(found.location).upper()
    places = [str(place).lower() for place in (getattr(found, "data_locations", None) or ())]
    if region and not _near(location, places, region):
        raise UserError(
            f"the bucket {name} is not in the accelerator's region: slow, and every byte is billed",
            got=f"{location.lower()}, not {region}",
            fix=f"gcloud storage buckets create gs://ANOTHER --location={region}")
    return f"bucket {name}: in {location.lower()}, may be written"


def _near(location: str, places: list[str], region: str) -> bool:
    if location.lower() == region or region in places:
        return True
    # A pair of regions that lies elsewhere; without its places, give it the benefit of the doubt.
    if location not in _CONTINENTS:
        return location.isalnum() and not places and "-" not in location
    return region.startswith(_CONTINENTS[location])


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
