import pickle

import grpc
import pytest

from joinwise.cluster import errors


@pytest.mark.parametrize("kind", errors.ERRORS.values(), ids=errors.ERRORS)
def test_every_error_has_statuses_and_survives_the_wire_and_pickle(kind: type[errors.JoinwiseError]) -> None:
    assert 400 <= kind.http_status < 600
    assert grpc.StatusCode[kind.grpc_status] is not grpc.StatusCode.OK
    error = kind("it broke; mend it", request_id="r1", retry_after_s=2.0)
    again = errors.error_from_code(error.code, error.message, request_id="r1", retry_after_s=2.0)
    for copy in (again, pickle.loads(pickle.dumps(error))):
        assert type(copy) is kind
        assert (copy.message, copy.request_id, copy.retry_after_s) == ("it broke; mend it", "r1", 2.0)
        assert str(copy) == "it broke; mend it (request r1)"


def test_codes_are_unique() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(errors.ERRORS) == len(kinds) - 1  # all but the base


def test_an_unknown_code_is_internal() -> None:
    assert type(errors.error_from_code("from-the-future", "hm")) is errors.InternalError


def test_config_problems_survive_pickle() -> None:
    assert pickle.loads(pickle.dumps(errors.ConfigError("two", problems=("a", "b")))).problems == ("a", "b")
