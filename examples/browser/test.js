// Prints what the page generates from gpt.tflite, in headless Chromium: node test.js [PROMPT] [LENGTH]
import { chromium } from "playwright-core";
import { serve } from "./serve.js";

const [prompt = "import os\n", length = "41"] = process.argv.slice(2);
const server = await serve(0);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"],
});
try {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(error.message));
  await page.goto(`http://127.0.0.1:${server.address().port}/?length=${length}`);
  await page.waitForFunction("/^(Ready|Error)/.test(document.getElementById('state').textContent)");
  const state = () => page.textContent("#state");
  if ((await state()).startsWith("Error")) throw new Error([await state(), ...errors].join("\n"));
  await page.fill("#prompt", prompt);
  await page.click("#go");
  await page.waitForFunction("/^(Done|Error)/.test(document.getElementById('state').textContent)");
  if ((await state()).startsWith("Error") || errors.length) {
    throw new Error([await state(), ...errors].join("\n"));
  }
  console.error(await state());
  process.stdout.write(await page.textContent("#text"));
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
} finally {
  await browser.close();
  server.close();
}
