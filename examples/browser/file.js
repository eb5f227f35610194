// What a .tflite of tfgptopt says of itself: its metadata, out of the flatbuffer.

/** Returns the metadata of a file as an object: docs/tflite_format.md lists its fields. */
export function readMetadata(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const model = view.getUint32(0, true);
  const buffers = vector(view, model, 4);
  for (const entry of vector(view, model, 6)) {
    if (text(view, field(view, entry, 0)) !== "tfgptopt") continue;
    const buffer = buffers[view.getUint32(field(view, entry, 1), true)];
    return JSON.parse(new TextDecoder().decode(contents(view, buffer)));
  }
  throw new Error("The file was not written by tfgptopt: it has no metadata of that name.");
}

/** Where the field of a table stands, or 0 if the table lacks it. */
function field(view, table, index) {
  const vtable = table - view.getInt32(table, true);
  const at = 4 + 2 * index;
  if (at >= view.getUint16(vtable, true)) return 0;
  const offset = view.getUint16(vtable + at, true);
  return offset && table + offset;
}

function follow(view, at) {
  return at + view.getUint32(at, true);
}

/** Positions of the tables of a vector of tables. */
function vector(view, table, index) {
  const at = field(view, table, index);
  if (!at) return [];
  const begin = follow(view, at);
  const length = view.getUint32(begin, true);
  return Array.from({ length }, (_, i) => follow(view, begin + 4 + 4 * i));
}

function text(view, at) {
  const begin = follow(view, at);
  const bytes = new Uint8Array(view.buffer, view.byteOffset + begin + 4, view.getUint32(begin, true));
  return new TextDecoder().decode(bytes);
}

/** Data of a buffer: in the flatbuffer, or behind it at an offset of its own. */
function contents(view, buffer) {
  const inside = field(view, buffer, 0);
  if (inside) {
    const begin = follow(view, inside);
    return new Uint8Array(view.buffer, view.byteOffset + begin + 4, view.getUint32(begin, true));
  }
  const offset = Number(view.getBigUint64(field(view, buffer, 1), true));
  const size = Number(view.getBigUint64(field(view, buffer, 2), true));
  return new Uint8Array(view.buffer, view.byteOffset + offset, size);
}
