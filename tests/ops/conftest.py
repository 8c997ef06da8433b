"""Every op test runs on every backend that is here."""

import pytest

from kdmos.ops import native


@pytest.fixture(autouse=True, params=["native", "reference"])
def backend(request):
    """The backend in use."""
    if request.param == "native" and not native.BUILT:
        pytest.skip("the native ops are not built")
    with native.backend(request.param):
        yield request.param
