"""The room of data: ragged tasks come in, masked batches and episodes go out. It knows no model and no inference."""
