"""Files wherever they are: on this machine, in S3 (`s3://`), in Google Cloud Storage (`gs://`) or on an HTTP server.

What a remote kind needs beside `requirements.txt` is listed in `requirements-remote.txt`. Credentials and endpoints
are those that the tools of each service use, such as AWS_PROFILE, AWS_ENDPOINT_URL or GOOGLE_APPLICATION_CREDENTIALS.
What else the clients take goes into fsspec's own configuration, such as FSSPEC_S3_ANON=true or FSSPEC_GCS_TOKEN=anon
for a bucket that anybody may read.
"""

from data.files.addresses import is_folder, is_local, joined, whole
from data.files.reader import Files
from data.files.servers import Facts

__all__ = ["Facts", "Files", "is_folder", "is_local", "joined", "whole"]
