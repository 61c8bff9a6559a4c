"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The machines are small and busy: how long an example takes says nothing about the code.
settings.register_profile("kvstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstream")
