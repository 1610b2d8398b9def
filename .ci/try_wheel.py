"""Import every public name from the installed wheel, without the repository in sight."""

import pl_layer_rotation

assert "site-packages" in pl_layer_rotation.__file__, pl_layer_rotation.__file__
for name in pl_layer_rotation.__all__:
    assert getattr(pl_layer_rotation, name).__doc__, name
print(f"pl_layer_rotation {pl_layer_rotation.__version__}: {', '.join(pl_layer_rotation.__all__)}")
