# MLflow server; the same version as the project's own pin.
FROM python:3.11-slim-bookworm
RUN pip install --no-cache-dir mlflow==3.17.2 boto3==1.44.5 psycopg2-binary==2.9.13
RUN useradd --create-home --uid 1000 mlflow
USER 1000
WORKDIR /home/mlflow
