# NVIDIA's image has an optimized torch, Transformer Engine and apex. The build fails if its torch is older than 2.11.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

WORKDIR /opt/megatron_slm
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron_slm megatron_slm
COPY tools tools
COPY examples examples

# The constraints of the image keep its torch and Transformer Engine.
RUN pip install --no-cache-dir .[hopper] \
    && python -c "import megatron.core, transformer_engine.pytorch, megatron_slm"

ENV CUDA_DEVICE_MAX_CONNECTIONS=1
WORKDIR /workspace
