// Calls a service's GenerateStream and Chat, an unknown model and a stream that it cancels; prints one JSON object.
// Usage: node client.mjs HOST:PORT PROTO_ROOT MODEL
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, protoRoot, model] = process.argv.slice(2);
const definition = protoLoader.loadSync("protos/inference.proto", {
  includeDirs: [protoRoot],
  keepCase: true,
  longs: Number,
  enums: String,
});
const { Inference } = grpc.loadPackageDefinition(definition).corral.v1;
const client = new Inference(address, grpc.credentials.createInsecure());
const deadline = () => ({ deadline: Date.now() + 60_000 });

const request = {
  model,
  text: "The horses",
  sampling: { temperature: 0, seed: 1 },
  stopping: { max_tokens: 12, ignore_eos: true },
};

function generateStream() {
  return new Promise((resolve, reject) => {
    const chunks = [];
    const call = client.GenerateStream(request, deadline());
    call.on("data", (chunk) => chunks.push(chunk));
    call.on("end", () => resolve(chunks));
    call.on("error", reject);
  });
}

function cancelled() {
  return new Promise((resolve) => {
    const call = client.GenerateStream({ ...request, stopping: { max_tokens: 400, ignore_eos: true } }, deadline());
    call.once("data", () => call.cancel());
    call.on("error", (error) => resolve(error.code));
    call.on("end", () => resolve(grpc.status.OK));
  });
}

function unary(method, message) {
  return new Promise((resolve) => {
    client[method](message, deadline(), (error, response) =>
      resolve(error ? { code: error.code, details: error.details } : response),
    );
  });
}

const chunks = await generateStream();
const result = {
  text: chunks.map((chunk) => chunk.text).join(""),
  token_ids: chunks.flatMap((chunk) => chunk.token_ids),
  token_indexes: chunks.map((chunk) => chunk.token_index),
  finish_reason: chunks.at(-1).finish_reason,
  usage: chunks.at(-1).usage,
  chat: await unary("Chat", {
    model,
    messages: [{ role: "user", content: "Hello" }],
    stopping: { max_tokens: 5, ignore_eos: true },
  }),
  unknown_model: await unary("Generate", { ...request, model: "no-such-model" }),
  bad_value: await unary("Generate", { ...request, sampling: { temperature: 9 } }),
  cancelled: await cancelled(),
};
console.log(JSON.stringify(result));
client.close();
