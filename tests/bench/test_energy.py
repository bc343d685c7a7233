"""Joules, watts and the clock while a product runs, and a word where they cannot be read."""

import ctypes

import pytest

from bench import energy, power


class Nvml:
    """Counts 70 J between two readings, at 700 W and 1980 MHz; refuses what `refused` names."""

    def __init__(self, refused=()):
        self.refused, self.joules = refused, 0

    def _tell(self, name, number, value):
        number._obj.value = value
        return 3 if name in self.refused else 0

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu, number):
        self.joules += 70
        return self._tell("energy", number, 1000 * self.joules)

    def nvmlDeviceGetPowerUsage(self, gpu, number):
        return self._tell("power", number, 700_000)

    def nvmlDeviceGetClockInfo(self, gpu, kind, number):
        assert kind == power.SM_CLOCK
        return self._tell("clock", number, 1980)


def test_energy_of_a_call(monkeypatch):
    nvml = Nvml()
    monkeypatch.setattr(power, "_first_gpu", lambda: (nvml, ctypes.c_void_p()))
    monkeypatch.setattr(energy, "INTERVAL", 0.001)
    calls = []
    found = energy.spend(lambda: calls.append(1), 10, 0.05)
    assert found["millijoules"] == pytest.approx(70_000 / (10 * len(calls)))
    assert found["watts"] == 700 and found["megahertz"] == 1980 and "note" not in found
    assert 0.05 <= found["seconds"] * 10 * len(calls) < 5
    refusing = Nvml(("energy", "power", "clock"))
    monkeypatch.setattr(power, "_first_gpu", lambda: (refusing, ctypes.c_void_p()))
    assert power.joules() is power.watts() is power.megahertz() is power.since(1.0, 2) is None


def test_power_is_none_without_the_drivers_library(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    power._first_gpu.cache_clear()
    assert power.joules() is power.watts() is power.megahertz() is None
    power._first_gpu.cache_clear()
