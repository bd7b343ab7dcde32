# API, inference worker, upkeep, migrate: no torch. Build from the repository's root:
#   docker build -f docker/service.Dockerfile --build-arg ORT=cpu -t pcrl-service:cpu .
FROM python:3.11.14-slim-bookworm AS build
# cpu | gpu: which onnxruntime; the two distributions must never meet (pyproject.toml).
ARG ORT=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY imaging imaging
COPY models models
COPY trainer trainer
COPY service service
COPY migrations migrations
RUN pip install --constraint constraints.txt ".[${ORT}]" \
    && pip check \
    && python -c "import importlib.util as u; assert u.find_spec('torch') is None"

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
EXPOSE 8000
CMD ["pcrl", "api"]
