import json

import pytest

from joinwise.cluster.ledger import RequestLedger

LEDGER = RequestLedger(
    request_id="r1",
    model="m",
    assignment_reason="split",
    prefill_worker="p0",
    decode_worker="d0",
    transport="grpc",
    routed_s=0.0012345678,
    wire_bytes=34_600_000,
    replayed_steps=1,
    output_tokens=64,
    finish_reason="length",
    total_s=12.5,
)


def test_json_round_trip() -> None:
    again = RequestLedger.from_json(LEDGER.to_json())
    assert again.routed_s == 0.001235
    again.routed_s = LEDGER.routed_s
    assert again == LEDGER


def test_fields_of_a_newer_release_are_passed_over() -> None:
    assert RequestLedger.from_json(json.dumps({**json.loads(LEDGER.to_json()), "new": 1})).request_id == "r1"


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 2, "request_id": "r"}', '{"version": 1}', "nonsense"])
def test_what_is_no_ledger_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        RequestLedger.from_json(text)
