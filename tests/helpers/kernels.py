"""Where the kernels can be tested."""

import os
import shutil

import pytest

DEVICE = os.environ.get("VCA_TEST_DEVICE", "cpu")
compiler = shutil.which(os.environ.get("CXX", "c++"))


needs_compiler = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")
