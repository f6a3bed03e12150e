"Files that tests of one module look at are let go after it"
import pytest
from tests.helpers.files import kept

@pytest.fixture(scope='module', autouse=True)
def let_go():
    yield
    kept.cache_clear()
