"""Where official clients look for Google: every product that they know has its endpoint here.

A product that localcloud serves is where its API is; of any other the server says that it does not serve it.
No client that runs in this environment has a reason left to ask a host of Google's.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_PLUGIN_PATHS = {
    "artifact_registry": "artifactregistry/v1/",
    "cloud_resource_manager": "cloudresourcemanager/v1/",
    "compute": "compute/beta/",
    "container": "container/v1beta1/",
    "iam": "iam/v1/",
    "iam_beta": "iam/v1/",
    "kms": "cloudkms/v1/",
    "resource_manager": "cloudresourcemanager/v1/",
    "resource_manager3": "cloudresourcemanager/v3/",
    "resource_manager_v3": "cloudresourcemanager/v3/",
    "service_usage": "serviceusage/v1/",
    "tags": "cloudresourcemanager/v3/",
}
"""The products that are served, by the plugin's name of their setting (`…_custom_endpoint`)."""
_OTHER_SPELLINGS = {"container_aws": "containeraws", "container_azure": "containerazure"}
"""What the plugin calls a variable where it is not the setting's name."""
_GCLOUD_PATHS = {"compute": "compute/v1/"}
"""gcloud adds the version itself, to all but this."""
_SETTING = re.compile(r"def (\w+)_custom_endpoint\(")


def is_variable(name: str) -> bool:
    """Whether an environment variable says where a product is, to the plugin or to gcloud."""
    return re.fullmatch(r"GOOGLE_\w+_CUSTOM_ENDPOINT|CLOUDSDK_API_ENDPOINT_OVERRIDES_\w+", name) is not None


def of_plugin(url: str) -> dict[str, str]:
    """The variables of the official gcp plugin: one for each product that the installed SDK knows."""
    values = {}
    for product in sorted({*_PLUGIN_PATHS, *_products()}):
        path = _PLUGIN_PATHS.get(product, f"{product.replace('_', '')}/v1/")
        for name in {product, _OTHER_SPELLINGS.get(product, product)}:
            values[f"GOOGLE_{name.upper()}_CUSTOM_ENDPOINT"] = f"{url}/{path}"
    return values


def of_gcloud(url: str) -> dict[str, str]:
    """gcloud's variables: one for each API that Google describes."""
    return {
        f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name.upper()}": f"{url}/{_GCLOUD_PATHS.get(name, f'{name}/')}"
        for name in sorted(_apis())
    }


def _products() -> set[str]:
    # Read, not imported: the SDK is large, and a shell waits for this.
    package = importlib.util.find_spec("pulumi_gcp")
    if package is None or package.origin is None:
        return set()
    return set(_SETTING.findall((Path(package.origin).parent / "config" / "vars.py").read_text()))


def _apis() -> set[str]:
    package = importlib.util.find_spec("googleapiclient")
    if package is None or package.origin is None:
        return {path.partition("/")[0] for path in _PLUGIN_PATHS.values()}
    documents = Path(package.origin).parent / "discovery_cache" / "documents"
    return {path.name.partition(".")[0] for path in documents.glob("*.json")} - {"index"}
