# syntax=docker/dockerfile:1
# diffkd with everything that it can do, for a CPU or for NVIDIA GPUs:
#
#   docker build -t diffkd .                                       # GPUs: PyTorch of PyPI brings its own CUDA
#   docker build -t diffkd:cpu --build-arg TORCH=cpu .             # a CPU alone, some gigabytes less
#   docker run --rm -v "$PWD:/work" diffkd:cpu demo
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" diffkd fit RECIPE --out runs/mine
#
# --ipc host (or --shm-size 8g): workers hand images over in shared memory, of which a container has 64 MB by itself.
# Own files belong to you with: docker run --user "$(id -u):$(id -g)" ...
FROM python:3.12-slim AS build
RUN pip install --no-cache-dir uv
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/diffkd
RUN uv venv /opt/diffkd
ARG TORCH=cuda
# PyTorch in a layer of its own: it is the largest by far, and changes least.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install "torch>=2.8" torchvision \
    $([ "$TORCH" = cpu ] && echo "--index-url https://download.pytorch.org/whl/cpu")
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN --mount=type=cache,target=/root/.cache/uv uv pip install "/src[all]"

FROM python:3.12-slim
# torch.compile builds its kernels with a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/diffkd /opt/diffkd
# Caches of fetched weights and of fonts need a place that any user may write.
ENV PATH=/opt/diffkd/bin:$PATH HF_HOME=/tmp/huggingface TORCH_HOME=/tmp/torch MPLCONFIGDIR=/tmp/matplotlib HOME=/tmp
WORKDIR /work
ENTRYPOINT ["diffkd"]
CMD ["--help"]
