# An image that trains. Its install lines were run by hand in an empty environment, with torch for CPUs; the image itself
# has not been built yet.
#
#   docker build -t linpass .
#   docker run --init --ipc=host --gpus all -v "$PWD/out:/outputs" --user "$(id -u):$(id -g)" linpass
#   docker run ... linpass train --preset base --text_files my.txt        any other command of `linpass`
#
# `mkdir out` first, so that it is yours. Without -v the results lie in a volume of the container (docker cp). --ipc=host
# is for --dataloader_num_workers, whose batches pass through shared memory. A CPU machine needs no --gpus.
#
# The base has no CUDA: torch's wheels from PyPI carry their own CUDA libraries, and the NVIDIA container runtime adds
# the driver, so that nothing is in the image twice.
FROM python:3.11.14-slim-bookworm

# Triton and torch.compile write C and C++ and compile it when a run starts.
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/linpass

# torch is the largest layer; without CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --index-url "$TORCH_INDEX" "$TORCH"

# Then what setup.py asks for, installed for an empty package, so that a change of the source keeps this layer.
COPY setup.py pyproject.toml constraints.txt ./
RUN mkdir linpass presets \
    && touch README.md LICENSE \
    && echo '__version__ = "0"' > linpass/__init__.py \
    && pip install -c constraints.txt "$TORCH" ".[train]" \
    && pip uninstall -y linpass \
    && rm -rf linpass presets build ./*.egg-info

COPY README.md LICENSE ./
COPY presets presets
COPY linpass linpass
RUN pip install --no-deps .

# HOME is the volume: models, checkpoints and every cache (Hugging Face, linpass, Triton, matplotlib) go there, whoever
# runs the image: a --user without a name in /etc/passwd can write them too.
RUN useradd --uid 1000 --home-dir /outputs linpass && install --directory --owner linpass --mode 1777 /outputs
ENV HOME=/outputs USER=linpass PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER linpass
WORKDIR /outputs
VOLUME /outputs

ENTRYPOINT ["linpass"]
CMD ["train"]
