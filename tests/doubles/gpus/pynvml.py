"""A stand-in for NVIDIA's library: one GPU, with the name that NVML_TEST_GPU says. An
interpreter of tests/interpreters.py finds it in the library's place, so that a fleet has several
devices.
"""
# ruff: noqa: N802

import os
from types import SimpleNamespace

NAME = os.environ["NVML_TEST_GPU"]
# As NVIDIA numbers them: no driver's library, no driver, another version of the driver.
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
MEMORY = SimpleNamespace(total=24 * 2**30, free=23 * 2**30)


class NVMLError(Exception):
    value = None


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlSystemGetDriverVersion():
    return "000.00"


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    return uuid


def nvmlDeviceGetUUID(handle):
    return "GPU-00000000-0000-0000-0000-000000000000"


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 0


def nvmlDeviceGetName(handle):
    return NAME


def nvmlDeviceGetMemoryInfo(handle):
    return MEMORY


def nvmlDeviceGetComputeRunningProcesses(handle):
    return []
