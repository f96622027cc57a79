"""What is said of a file of another kind: what is needed instead, and what to do."""

from __future__ import annotations

AN_HTML_PAGE = "an HTML or XML page, perhaps an error page saved under a model's name"

_WANTED = "A state dict (.pt, .pth, .safetensors) of a torchvision, timm or your own model is needed."
_OF_ANOTHER_FRAMEWORK = ("Only PyTorch models have torch layers. " + _WANTED, "the PyTorch version of the model")
_OF_TENSORFLOW = (
    "Only PyTorch models have torch layers; timm has many of TensorFlow's with their weights. " + _WANTED,
    "the PyTorch version of the model, a name in timm.list_models('*tf_*')",
)
_EXPORTED = ("It has no PyTorch modules to replace. " + _WANTED, "the PyTorch model it was exported from")

BY_SUFFIX = {
    "a TensorFlow model": (".pb", ".tflite"),
    "a Core ML model": (".mlmodel", ".mlpackage"),
    "a TensorRT engine": (".engine", ".plan", ".trt"),
    "an ExecuTorch program": (".pte",),
    "a GGUF file": (".gguf", ".ggml"),
    "an ncnn model": (".param",),
    "a Darknet model": (".weights", ".cfg"),
    "a Caffe model": (".caffemodel", ".prototxt"),
    "a PaddlePaddle model": (".pdparams", ".pdmodel", ".pdiparams"),
    "a MATLAB file": (".mat",),
    "a Python file": (".py",),
}
"""Kinds of files whose first bytes do not tell, by the end of their names."""

REFUSALS = {
    **dict.fromkeys(
        ("a Core ML model", "a TensorRT engine", "an ExecuTorch program", "an ncnn model", "an ONNX model"), _EXPORTED
    ),
    "an OpenVINO model": _EXPORTED,
    **dict.fromkeys(
        (
            *("a Caffe model", "a Darknet model", "a GGUF file", "a MATLAB file"),
            "a PaddlePaddle model",
        ),
        _OF_ANOTHER_FRAMEWORK,
    ),
    **dict.fromkeys(
        ("a Keras model", "a TensorFlow checkpoint", "a TensorFlow model", "an HDF5 file (Keras)"), _OF_TENSORFLOW
    ),
    **dict.fromkeys(("the weights of an OpenVINO model", "the weights of an ncnn model"), _EXPORTED),
    "an empty file": (_WANTED, "copy or download it again"),
    AN_HTML_PAGE: (_WANTED, "download it again: less {path}"),
    "a text file": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "a TorchScript archive": (
        "A scripted or traced module has no layers left to replace. " + _WANTED,
        "torch.save(torch.jit.load('{path}').state_dict(), 'model.pt') where you trust it",
    ),
    "an exported program (.pt2)": (
        "An exported program has no layers left to replace. " + _WANTED,
        "torch.save(dict(torch.export.load('{path}').state_dict), 'model.pt') where you trust it",
    ),
    "a zip that unpacks to far more than a checkpoint can": (_WANTED, "another file"),
    "a zip archive that is no checkpoint": (_WANTED, "unzip it first, and give the checkpoint inside"),
    "a Git LFS pointer, not the file itself": (_WANTED, "git lfs pull"),
    "a tar archive": (_WANTED, "tar xf {path}, then the checkpoint inside"),
    "NumPy arrays (.npz)": (
        _WANTED,
        "torch.save({{name: torch.from_numpy(array) for name, array in numpy.load('{path}').items()}}, 'model.pt')",
    ),
    "a file of zeros": ("It was not downloaded or copied to the end. " + _WANTED, "copy or download it again"),
    "a Python file": (
        "A function in it that builds the model is one, where Python finds the file. " + _WANTED,
        "{stem}:FUNCTION",
    ),
    "a gzip archive": (_WANTED, "gunzip or tar xzf it first"),
    "a bzip2 archive": (_WANTED, "unpack it first"),
    "an xz archive": (_WANTED, "unxz or tar xJf it first"),
    "a 7z archive": (_WANTED, "unpack it first"),
    "a NumPy array": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
    "an image": ("Images are not a model: they go into data=. " + _WANTED, 'data="FOLDER"'),
    "a file of unknown kind": (_WANTED, "torch.save(model.state_dict(), 'model.pt')"),
}
