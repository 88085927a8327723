"""The denoising process as Gymnasium environments: `vector` is the implementation, `single` its view at N = 1."""
