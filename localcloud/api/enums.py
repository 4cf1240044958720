"""The numbers of enums' values: Google's newer client libraries send and ask for them (`enum-encoding=int`).

The discovery documents have the values in the order of their numbers, but not the numbers: those that are not
their place in the list are below, from the protocol buffers that Google's clients are made of.
"""

from __future__ import annotations

from typing import Any

from localcloud.store import Json

_CODES = {
    "UNAUTHENTICATED": 16,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "OUT_OF_RANGE": 11,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
}
_ALGORITHMS = {
    "RSA_SIGN_PSS_2048_SHA256": 2,
    "RSA_SIGN_PSS_3072_SHA256": 3,
    "RSA_SIGN_PSS_4096_SHA256": 4,
    "RSA_SIGN_PKCS1_2048_SHA256": 5,
    "RSA_SIGN_PKCS1_3072_SHA256": 6,
    "RSA_SIGN_PKCS1_4096_SHA256": 7,
    "RSA_DECRYPT_OAEP_2048_SHA256": 8,
    "RSA_DECRYPT_OAEP_3072_SHA256": 9,
    "RSA_DECRYPT_OAEP_4096_SHA256": 10,
    "EC_SIGN_P256_SHA256": 12,
    "EC_SIGN_P384_SHA384": 13,
    "RSA_SIGN_PSS_4096_SHA512": 15,
    "RSA_SIGN_PKCS1_4096_SHA512": 16,
    "RSA_DECRYPT_OAEP_4096_SHA512": 17,
    "EXTERNAL_SYMMETRIC_ENCRYPTION": 18,
    "AES_256_GCM": 19,
    "RSA_SIGN_RAW_PKCS1_2048": 28,
    "RSA_SIGN_RAW_PKCS1_3072": 29,
    "RSA_SIGN_RAW_PKCS1_4096": 30,
    "EC_SIGN_SECP256K1_SHA256": 31,
    "HMAC_SHA256": 32,
    "HMAC_SHA1": 33,
    "HMAC_SHA384": 34,
    "HMAC_SHA512": 35,
    "HMAC_SHA224": 36,
    "RSA_DECRYPT_OAEP_2048_SHA1": 37,
    "RSA_DECRYPT_OAEP_3072_SHA1": 38,
    "RSA_DECRYPT_OAEP_4096_SHA1": 39,
    "EC_SIGN_ED25519": 40,
    "AES_128_GCM": 41,
    "AES_128_CBC": 42,
    "AES_256_CBC": 43,
    "AES_128_CTR": 44,
    "AES_256_CTR": 45,
    "ML_KEM_768": 47,
    "ML_KEM_1024": 48,
    "PQ_SIGN_ML_DSA_65": 56,
    "PQ_SIGN_SLH_DSA_SHA2_128S": 57,
    "PQ_SIGN_HASH_SLH_DSA_SHA2_128S_SHA256": 60,
    "KEM_XWING": 63,
    "PQ_SIGN_ML_DSA_65_EXTERNAL_MU": 67,
    "PQ_SIGN_ML_DSA_44": 68,
    "PQ_SIGN_ML_DSA_87": 69,
    "PQ_SIGN_ML_DSA_44_EXTERNAL_MU": 70,
    "PQ_SIGN_ML_DSA_87_EXTERNAL_MU": 71,
    "AES_256_KWP": 73,
}
_NUMBERS: dict[tuple[str, str], dict[str, int]] = {
    ("AdvancedDatapathObservabilityConfig", "relayMode"): {"INTERNAL_VPC_LB": 3, "EXTERNAL_LB": 4},
    ("AutopilotConversionStatus", "state"): {"DONE": 5},
    ("BinaryAuthorization", "evaluationMode"): {
        "POLICY_BINDINGS": 5,
        "POLICY_BINDINGS_AND_PROJECT_SINGLETON_POLICY_ENFORCE": 6,
    },
    ("BlueGreenInfo", "phase"): {
        "WAITING_TO_DRAIN_BLUE_POOL": 8,
        "DRAINING_BLUE_POOL": 4,
        "NODE_POOL_SOAKING": 5,
        "DELETING_BLUE_POOL": 6,
        "ROLLBACK_STARTED": 7,
    },
    ("ClusterUpgradeInfo", "autoUpgradeStatus"): {"MINOR_UPGRADE_PAUSED": 4, "UPGRADE_PAUSED": 5},
    ("ClusterUpgradeInfo", "pausedReason"): {
        "MAINTENANCE_EXCLUSION_NO_UPGRADES": 5,
        "MAINTENANCE_EXCLUSION_NO_MINOR_UPGRADES": 6,
        "CLUSTER_DISRUPTION_BUDGET_MINOR_UPGRADE": 7,
        "SYSTEM_CONFIG": 8,
    },
    ("CryptoKey", "purpose"): {
        "ASYMMETRIC_SIGN": 5,
        "ASYMMETRIC_DECRYPT": 6,
        "RAW_ENCRYPT_DECRYPT": 7,
        "MAC": 9,
        "KEY_ENCAPSULATION": 10,
        "AES_WRAPPING": 11,
    },
    ("CryptoKeyVersion", "algorithm"): _ALGORITHMS,
    ("CryptoKeyVersion", "state"): {
        "ENABLED": 1,
        "DISABLED": 2,
        "DESTROYED": 3,
        "DESTROY_SCHEDULED": 4,
        "PENDING_GENERATION": 5,
    },
    ("CryptoKeyVersionTemplate", "algorithm"): _ALGORITHMS,
    ("DatabaseEncryption", "currentState"): {
        "CURRENT_STATE_ENCRYPTED": 7,
        "CURRENT_STATE_ALL_OBJECTS_ENCRYPTION_ENABLED": 8,
        "CURRENT_STATE_ALL_OBJECTS_ENCRYPTION_PENDING": 9,
        "CURRENT_STATE_ALL_OBJECTS_ENCRYPTION_ERROR": 10,
    },
    ("DataplaneV2Config", "scalabilityMode"): {"DISABLED": 3, "SCALE_OPTIMIZED": 4},
    ("GPUDirectConfig", "gpuDirectStrategy"): {"RDMA": 2},
    ("GatewayAPIConfig", "channel"): {"CHANNEL_EXPERIMENTAL": 3, "CHANNEL_STANDARD": 4},
    ("ImportCryptoKeyVersionRequest", "algorithm"): _ALGORITHMS,
    ("ImportJob", "importMethod"): {
        "HPKE_KEM_ML_KEM_768_HKDF_SHA256_AES_256_GCM": 8,
        "HPKE_KEM_ML_KEM_1024_HKDF_SHA256_AES_256_GCM": 9,
        "HPKE_KEM_XWING_HKDF_SHA256_AES_256_GCM": 10,
    },
    ("ImportTrustedKeyWrappedCryptoKeyVersionRequest", "algorithm"): _ALGORITHMS,
    ("KeyOperationAttestation", "format"): {"CAVIUM_V1_COMPRESSED": 3, "CAVIUM_V2_COMPRESSED": 4},
    ("LoggingComponentConfig", "enableComponents"): {
        "KCP_SSHD": 7,
        "KCP_CONNECTION": 8,
        "KCP_HPA": 9,
        "KCP_VPA": 10,
    },
    ("MonitoringComponentConfig", "enableComponents"): {
        "APISERVER": 3,
        "SCHEDULER": 4,
        "CONTROLLER_MANAGER": 5,
        "STORAGE": 7,
        "HPA": 8,
        "POD": 9,
        "DAEMONSET": 10,
        "DEPLOYMENT": 11,
        "STATEFULSET": 12,
        "CADVISOR": 13,
        "KUBELET": 14,
        "DCGM": 15,
        "JOBSET": 16,
    },
    ("Operation", "operationType"): {"RESIZE_CLUSTER": 18, "FLEET_FEATURE_UPGRADE": 19},
    ("StatusCondition", "canonicalCode"): _CODES,
    ("StatusCondition", "code"): {
        "CLOUD_KMS_KEY_ERROR": 7,
        "CA_EXPIRING": 9,
        "NODE_SERVICE_ACCOUNT_MISSING_PERMISSIONS": 10,
        "CLOUD_KMS_KEY_DESTROYED": 11,
    },
    ("UpgradeInfoEvent", "state"): {"STARTED": 3, "SUCCEEDED": 4, "FAILED": 5, "CANCELED": 6},
    ("UpgradeSettings", "strategy"): {"BLUE_GREEN": 2, "SURGE": 3, "SHORT_LIVED": 5},
    ("WorkloadConfig", "auditMode"): {"BASIC": 4, "BASELINE": 2, "RESTRICTED": 3},
    ("ProjectSettings", "legacyRedirectionState"): {
        "REDIRECTION_FROM_GCR_IO_ENABLED_AND_COPYING": 5,
        "REDIRECTION_FROM_GCR_IO_PARTIAL_AND_COPYING": 6,
    },
    ("PublicKey", "algorithm"): _ALGORITHMS,
    ("Repository", "format"): {
        "APT": 5,
        "YUM": 6,
        "PYTHON": 8,
        "KFP": 9,
        "GO": 10,
        "GENERIC": 11,
        "RUBY": 12,
    },
}


def are_numbered(service: str) -> bool:
    """Whether the numbers of a service's enums are known. Compute Engine's are hashes, and its clients send
    names.
    """
    return service != "compute"


def number(field: Json, value: str) -> int | None:
    """The number of one of a field's values."""
    numbers: dict[str, int] = field.get("numbers", {})
    found = numbers.get(value)
    if found is None and value in field["enum"]:
        return int(field["enum"].index(value))
    return found


def name(field: Json, wanted: int) -> str | None:
    """The value of a field that has this number."""
    for value in field["enum"]:
        if number(field, value) == wanted:
            return str(value)
    return None


def annotate(schemas: dict[str, Json]) -> None:
    """Write the numbers that are not an enum's own order beside it in a document's schemas."""
    for (schema, field), numbers in _NUMBERS.items():
        found = schemas.get(schema, {}).get("properties", {}).get(field)
        if found is not None:
            found.get("items", found)["numbers"] = numbers


def as_numbers(schemas: dict[str, Json], field: Json, value: Any) -> Any:
    """An answer with numbers in place of the names of enums' values."""
    if isinstance(value, list):
        return [as_numbers(schemas, field.get("items", {}), item) for item in value]
    if isinstance(value, dict):
        schema = schemas.get(field["$ref"], {}) if "$ref" in field else field
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", {})
        return {key: as_numbers(schemas, properties.get(key, extra), item) for key, item in value.items()}
    if "enum" in field and isinstance(value, str):
        found = number(field, value)
        return value if found is None else found
    return value
