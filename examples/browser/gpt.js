// A causal language model in a browser: LiteRT in WebAssembly, greedy.
import { Tokenizer } from "@huggingface/tokenizers";
import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";
import { readMetadata } from "./file.js";

export class CausalLM {
  /** Loads a file written by `tfgptopt export`. */
  static async load(url, wasm = "node_modules/@litertjs/core/wasm/") {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url} could not be read: ${response.status}`);
    const bytes = new Uint8Array(await response.arrayBuffer());
    const about = readMetadata(bytes);
    if (about.tokenizer === null) throw new Error(`${url} has no tokenizer of byte pairs.`);
    if (about.decoder.cache_dtype !== "float32") {
      throw new Error(`${url} has int8 caches, which LiteRT.js does not hold: export it without.`);
    }
    await loadLiteRt(wasm);
    const model = await loadAndCompile(bytes, { accelerator: "wasm" });
    return new CausalLM(model, about);
  }

  constructor(model, about) {
    this.about = about;
    this.decode = model.signatures.decode;
    this.context = about.decoder.context_length;
    this.tokenizer = new Tokenizer(JSON.parse(about.tokenizer), {});
  }

  /** Yields the continuation of a prompt, piece by piece. */
  async *generate(prompt, maxLength = 64) {
    const { start_token_id: start, end_token_ids: ends } = this.about.generation;
    const ids = this.tokenizer.encode(prompt, { add_special_tokens: false }).ids;
    const tokens = start === null ? [...ids] : [start, ...ids];
    if (!tokens.length) throw new Error("The prompt is empty, and the model has no start token.");
    const last = Math.min(maxLength, this.context);
    const begin = tokens.length;
    let cache = this.emptyCache();
    let shown = "";
    try {
      for (let position = 0; position < last - 1; position++) {
        const step = await this.step(tokens[position], position, cache);
        cache = step.cache;
        if (position + 1 < tokens.length) continue;
        if (ends.includes(step.likeliest)) break;
        tokens.push(step.likeliest);
        // Bytes of a character may be spread over tokens: only whole ones are shown.
        const text = this.tokenizer.decode(tokens.slice(begin), { skip_special_tokens: true });
        if (text.endsWith("\uFFFD")) continue;
        yield text.slice(shown.length);
        shown = text;
      }
    } finally {
      for (const tensor of Object.values(cache)) tensor.delete();
    }
  }

  emptyCache() {
    const caches = this.decode.getInputDetails().filter((one) => one.name.startsWith("kv_cache_"));
    return Object.fromEntries(caches.map(({ name, dtype, shape }) => {
      const size = shape.reduce((a, b) => a * b, 1);
      const zeros = dtype === "int8" ? new Int8Array(size) : new Float32Array(size);
      return [name, new Tensor(zeros, shape)];
    }));
  }

  async step(token, position, cache) {
    const tokens = new Tensor(Int32Array.of(token), [1]);
    const at = new Tensor(Int32Array.of(position), [1]);
    const inputs = { tokens, input_pos: at, ...cache };
    const names = this.decode.getInputDetails().map((one) => one.name);
    if (names.includes("window_start")) inputs.window_start = new Tensor(Int32Array.of(0), [1]);
    const { logits, ...updated } = await this.decode.run(inputs);
    inputs.window_start?.delete();
    const values = await logits.data();
    let likeliest = 0;
    for (let i = 1; i < values.length; i++) if (values[i] > values[likeliest]) likeliest = i;
    for (const tensor of [tokens, at, logits, ...Object.values(cache)]) tensor.delete();
    return { likeliest, cache: updated };
  }
}
