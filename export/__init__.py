"""Turns a user's model and unlabelled frames into a bundle, on a workstation. The stages, in order:

1. `source` (and `source_*`): whatever the user calls a model becomes one float ONNX graph
2. `simplify`: one form: uint8 frames in, logits out, an open batch
3. `cuts`: every tensor that alone separates the frame from the answer; the default choice
4. `frames`: what the device would see, parted into fit, threshold and judge
5. `quantize`: the whole model for a target, with a uint8 tensor at every chosen cut
6. `slicing`: one file per segment
7. `exits`: an exit head at every cut, fitted to the float model's own answers
8. `prove`: a replay through `runtime.cascade` and `runtime.codec` (with `agreement`), or there is no bundle
9. `bundle`: files, digests, golden vectors, renamed into place (with `timing` beside the contract)

`pipeline` calls them; `cli` is `kinflow export`; `graph` and `report` serve all of them.
"""
