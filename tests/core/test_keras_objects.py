import importlib
import subprocess
import sys

import keras
import pytest

from transfer.core import keras_objects

PROGRAM = """
import sys
{imports}
assert "transfer.layers.backbone" not in sys.modules
model = keras.models.load_model(sys.argv[1])
assert model.layers[0].__class__.__name__ == "Head"
assert type(model.layers[0]) is transfer.Head
"""


def test_table_lists_all_registered_classes():
    for module in set(keras_objects.CLASSES.values()):
        importlib.import_module(module)
    prefix = f"{keras_objects.PACKAGE}>"
    registered = {
        name.removeprefix(prefix): value.__module__
        for name, value in keras.saving.get_custom_objects().items()
        if name.startswith(prefix)
    }
    assert registered == keras_objects.CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import transfer, keras", "import keras, transfer"])
def test_importing_the_package_suffices_to_load_a_model(tmp_path, imports):
    from transfer import Head

    keras.Sequential([keras.Input((4,)), Head(2)]).save(tmp_path / "m.keras")
    program = PROGRAM.format(imports=imports)
    command = [sys.executable, "-c", program, tmp_path / "m.keras"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
