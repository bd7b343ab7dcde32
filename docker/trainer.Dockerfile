# Training worker: torch with CUDA (torch's own wheels bring the CUDA libraries; the host needs only
# the driver and the NVIDIA container toolkit). Build from the repository's root:
#   docker build -f docker/trainer.Dockerfile -t pcrl-trainer:gpu .
FROM python:3.11.14-slim-bookworm AS build
# cpu | gpu: which onnxruntime, for the parity gate of the export.
ARG ORT=gpu
# Where pip finds torch's CPU wheels, for a trainer without a GPU.
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first: its layer (gigabytes) is kept while our code changes.
RUN pip install --constraint constraints.txt torch
COPY imaging imaging
COPY models models
COPY trainer trainer
COPY service service
COPY migrations migrations
RUN pip install --constraint constraints.txt ".[train,${ORT}]" && pip check

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 10001 pcrl \
    && useradd --uid 10001 --gid pcrl --no-create-home --home-dir /tmp pcrl \
    && install -d -o pcrl -g pcrl -m 0750 /data
COPY --from=build /opt/venv /opt/venv
COPY docker/healthcheck.py /opt/pcrl/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    PCRL_DATA_DIR=/data \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME /data
CMD ["pcrl", "worker", "--queue", "train"]
