import os

import numpy as np

from transfer.data.names import Names


def test_names_equal_a_list():
    names = ["b/2.jpg", "", "ü\n", "c\udcff", "b/2.jpg"]
    found = Names.of(names)
    assert found == names and [*found] == names and found != names[1:]
    assert found[3] == names[3] and found[-1] == names[-1]
    assert found[1:3] == names[1:3]
    assert found[np.array([3, 0])] == [names[3], names[0]]
    assert found[np.array([True, False, False, True, False])] == [names[0], names[3]]
    assert "c\udcff" in found and "c" not in found
    assert [*found.encoded()] == [os.fsencode(name) for name in names]
    assert Names.of([]) == [] and len(Names.of([])) == 0
