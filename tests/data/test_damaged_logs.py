"""Logs of all formats with random damage: reading raises an InputError of one sentence, or returns a valid log."""

import random

import pytest

from lares_fast._errors import InputError
from lares_fast.data import read_log

pytest.importorskip("pyarrow")

from tests.reliability.fuzzing.log_files import HISTORIES, NAMED, damaged, files
from tests.reliability.fuzzing.log_parsers import breach


def test_damaged_logs_are_refused_in_one_sentence_or_sound(tmp_path):
    draw, refused, read = random.Random(18), 0, 0
    for _ in range(130):
        for name, content in files(draw):
            path = tmp_path / name
            path.write_bytes(content)
            log = read_log(path)
            found = {log.user_ids[user]: log.item_ids[log.history(user)].tolist() for user in range(log.n_users)}
            assert found in (HISTORIES, NAMED), name
            path.write_bytes(damaged(content, draw))
            try:
                assert breach(read_log(path), 3) is None
                read += 1
            except InputError as error:
                refused += 1
                sentence = str(error).replace(str(tmp_path), "")
                assert sentence.endswith("."), sentence
                assert sentence.isprintable(), sentence
                assert len(sentence) < 500, sentence
    assert read > 100
    assert refused > 300
